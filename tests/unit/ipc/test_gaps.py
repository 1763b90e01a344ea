# SPDX-License-Identifier: Apache-2.0
"""Gaps of long prompts: ordered positions inside the rotary table, gaps as large as allowed."""

import re

import numpy as np
import pytest
import torch
from numpy.random import Generator

from flashvlm_vllm.ipc.gaps import (
    Gap,
    allowed_gap,
    dealt_out,
    dropped_tokens,
    gap_of,
    is_closed_name,
    is_pruned_name,
    item_name,
    shortened_name,
)
from flashvlm_vllm.worker.positions import Span, prompt_positions, with_places, write

IDENTITY = bytes(range(32))


def test_item_names_encode_the_gap() -> None:
    kept, closed = item_name(IDENTITY, 512, 512), item_name(IDENTITY, None, 512)
    assert gap_of(kept) == Gap(512, 512)
    assert gap_of(shortened_name(kept, 77)) == Gap(512, 77)
    assert gap_of(f"adapter:{shortened_name(kept, 77)}") == Gap(512, 77)
    assert gap_of(f"{kept}-witness-0") == Gap(512, 512)
    assert gap_of(closed) is gap_of("ab" * 32) is None
    assert is_closed_name(closed) and is_closed_name(f"adapter:{closed}")
    for name in (kept, closed, shortened_name(kept, 77)):
        assert is_pruned_name(name) and is_pruned_name(f"adapter:{name}")
    for name, dropped in ((kept, 512), (closed, 512), (shortened_name(kept, 77), 512)):
        assert dropped_tokens(name) == dropped_tokens(f"adapter:{name}") == dropped
    adapter = "flashvlm-5-5-adapter:" + "ab" * 32
    assert not is_pruned_name(adapter) and not is_closed_name("flashvlm-closed-5-x:" + "ab" * 32)
    assert dropped_tokens(item_name(IDENTITY, 0, 33)) == 33
    assert dropped_tokens("ab" * 32) == 0
    assert not is_closed_name(kept) and not is_pruned_name("ab" * 32)
    assert len({kept, closed, shortened_name(kept, 77), item_name(IDENTITY, 511, 511)}) == 4
    assert re.fullmatch(r"flashvlm-512-512-[0-9a-f]{64}", kept)


def test_gaps_that_fit_are_not_changed() -> None:
    assert allowed_gap(100, 512, 16, 4096, 4096) == (512, 16)
    # An answer that may fill the context ends at the last position, as without pruning.
    assert allowed_gap(100, 512, 3996, 4096, 4096) == (512, 3484)
    # A table longer than the context has room for both.
    assert allowed_gap(100, 512, 3996, 4096, 8192) == (512, 3996)


def test_twenty_images_in_a_short_context_get_shortened_gaps() -> None:
    tokens, gap = 650, 20 * (576 - 32)
    assert allowed_gap(tokens, gap, 16, 2048, 2048) == (2048 - 650 - 16, 16)
    assert allowed_gap(tokens, gap, 2048 - tokens, 2048, 2048) == (2048 - 650 - 512, 512)
    shares = dealt_out([544] * 20, 1382)
    assert sum(shares) == 1382
    assert set(shares) == {69, 70}


@pytest.mark.parametrize("step", [1, 7])
def test_gaps_change_continuously_at_the_limit(step: int) -> None:
    """One more token, of the prompt or of the answer, changes the gaps by at most one."""
    before = None
    for tokens in range(50, 4096, step):
        allowed, answer = allowed_gap(tokens, 3000, 100, 4096, 4096)
        if before is not None and tokens + 100 < 4096:
            assert before - step <= allowed <= before
        before = allowed
        assert allowed == 0 or tokens + allowed + answer <= 4096


class Case:
    """A random prompt: items in one or several runs of tokens, with the kept tokens of each."""

    def __init__(self, draw: Generator) -> None:
        self.context = int(draw.integers(64, 5000))
        self.table = self.context + int(draw.integers(0, 2) * draw.integers(0, 9000))
        self.whole: list[int] = []
        self.kept: list[np.ndarray] = []
        self.texts: list[int] = [int(draw.integers(0, 6))]
        self.edges: list[int] = []
        length = self.texts[0]
        for _ in range(int(draw.integers(1, 12))):
            total = int(draw.integers(2, 1500))
            budget = int(draw.integers(1, total))
            edge, text = int(draw.integers(0, 3)), int(draw.integers(0, 3) * draw.integers(0, 9))
            if length + budget + 2 * edge + text + 1 >= self.context:
                break
            length += budget + 2 * edge + text
            self.whole.append(total)
            self.kept.append(np.sort(draw.permutation(total)[:budget]))
            self.edges.append(edge)
            self.texts.append(text)
        self.texts[-1] += length == 0
        self.tokens = max(1, length)
        room = self.context - self.tokens
        self.answer = room if draw.integers(0, 2) else int(draw.integers(1, room + 1))

    def positions(self, chunk: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Return positions as a runner computes them, their total shift, and unpruned positions."""
        gaps = [whole - len(kept) for whole, kept in zip(self.whole, self.kept, strict=True)]
        fit = allowed_gap(self.tokens, sum(gaps), self.answer, self.context, self.table)
        self.allowed, self.longest = fit
        self.gap = sum(gaps)
        spans, rows, offset, expected = [], [], self.texts[0], list(range(self.texts[0]))
        passed = 0
        for total, kept, edge, text, gap, share in zip(
            self.whole,
            self.kept,
            self.edges,
            self.texts[1:],
            gaps,
            dealt_out(gaps, fit.gap),
            strict=True,
        ):
            length = len(kept) + 2 * edge
            is_open = np.zeros(length, dtype=np.bool_)
            is_open[edge : edge + len(kept)] = True
            numbers = np.arange(length)
            behind = numbers + np.where(numbers >= edge + len(kept), share, 0)
            places = np.where(is_open, np.cumsum(~is_open), behind)
            spans.append(Span(offset, places[:, None], length + share, share, is_open))
            blank = torch.zeros(len(kept), 1)
            rows.append(with_places(blank, torch.from_numpy(kept)[:, None], gap))
            base = offset + passed
            expected += [base + each for each in range(edge)]
            expected += [base + edge + int(each) for each in kept]
            expected += [base + edge + total + each for each in range(edge + text)]
            passed += gap
            offset += length + text
        positions, ahead = prompt_positions(self.tokens, spans, 1)
        for start in range(0, self.tokens, chunk):
            end, own_rows = min(self.tokens, start + chunk), []
            for span, own, edge in zip(spans, rows, self.edges, strict=True):
                first = max(0, start - span.offset - edge)
                last = min(len(own), end - span.offset - edge)
                if first < last:
                    own_rows.append(own[first:last])
            assert write(own_rows, positions, start, 1) == ahead
        return positions[0].numpy(), ahead, np.array(expected)


@pytest.mark.parametrize("prompts", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_drawn_prompts_stay_inside_the_table_and_in_order(prompts: int) -> None:
    draw = np.random.default_rng(17)
    outcomes = {"kept": 0, "shortened": 0, "closed": 0}
    for _ in range(prompts):
        case = Case(draw)
        positions, ahead, expected = case.positions(1 + case.tokens // int(draw.integers(1, 5)))
        assert (np.diff(positions) > 0).all()
        assert positions[0] >= 0
        # Positions of the answer continue after the prompt's.
        last = case.tokens + ahead + case.longest - 1
        assert positions[-1] < case.tokens + ahead
        assert last < case.table
        assert case.longest >= min(case.answer, max(1, case.context // 4))
        if case.allowed == case.gap:
            outcomes["kept"] += 1
            assert (positions == expected).all()
            assert ahead == case.gap
        elif case.allowed:
            outcomes["shortened"] += 1
            assert (positions <= expected).all()
            assert ahead == case.allowed
            # Adjacent tokens stay adjacent.
            near = np.diff(expected) == 1
            assert (np.diff(positions)[near] == 1).all()
        else:
            outcomes["closed"] += 1
            assert (positions == np.arange(case.tokens)).all()
    assert min(outcomes.values()) > prompts // 100, outcomes
