# SPDX-License-Identifier: Apache-2.0
"""Positions of kept tokens, against those of the whole prompt, index by index."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.multimodal.inputs import PlaceholderRange

from flashvlm_vllm.ipc.gaps import item_name
from flashvlm_vllm.position_scheme import AXES
from flashvlm_vllm.worker.positioned_model import PositionedModel
from flashvlm_vllm.worker.positions import (
    Span,
    channels,
    grid_positions,
    prompt_positions,
    with_places,
    without_places,
    write,
)

IMAGE, VIDEO = 7, 8
WIDTH = 4
CHANNELS = channels(AXES)


@dataclass
class Item:
    """An image or a video of a prompt, with the indices of its kept tokens (None: not pruned)."""

    visual: int
    grid: tuple[int, int, int, float]
    kept: Tensor | None

    @property
    def positions(self) -> Any:
        return grid_positions(*self.grid)

    @property
    def length(self) -> int:
        return len(self.positions) if self.kept is None else len(self.kept)


def item(visual: int, *grid: Any, keep: int | None = None, seed: int = 0) -> Item:
    steps, rows, columns = grid[:3]
    factor = grid[3] if len(grid) > 3 else 1.0
    kept = None
    if keep is not None:
        draw = torch.Generator().manual_seed(seed)
        kept = torch.randperm(steps * rows * columns, generator=draw)[:keep].sort().values
    return Item(visual, (steps, rows, columns, factor), kept)


@dataclass
class Prompt:
    """Text and items in turn; without text, items are adjacent, and at both ends of the prompt."""

    ids: list[int]
    spans: list[Span]
    embeddings: list[Tensor]
    items: list[Item]

    @classmethod
    def of(cls, items: list[Item], text: int = 5, dtype: torch.dtype = torch.bfloat16) -> "Prompt":
        ids, spans, embeddings = [1] * text, [], []
        for each in items:
            spans.append(Span.of_grid(len(ids), each.length, each.positions))
            ids += [each.visual] * each.length + [2] * text
            rows = torch.randn(each.length, WIDTH).to(dtype)
            embeddings.append(
                without_places(rows)
                if each.kept is None
                else with_places(
                    rows, torch.from_numpy(each.positions)[each.kept], int(each.positions.max()) + 1
                )
            )
        return cls(ids, spans, embeddings, items)

    def indices_in_the_whole(self) -> Tensor:
        """Return the index in the unpruned prompt of each token."""
        indices, index, shift = [], 0, 0
        for span, each in zip(self.spans, self.items, strict=True):
            indices.append(torch.arange(index, span.offset) + shift)
            total = len(each.positions)
            kept = torch.arange(total) if each.kept is None else each.kept
            indices.append(span.offset + shift + kept)
            shift += total - each.length
            index = span.offset + len(span.places)
        indices.append(torch.arange(index, len(self.ids)) + shift)
        return torch.cat(indices)

    def gathered(self, start: int, end: int) -> list[Tensor]:
        """Return the embeddings of the items, or parts of items, between two tokens."""
        parts = []
        for span, rows in zip(self.spans, self.embeddings, strict=True):
            first, last = max(start - span.offset, 0), min(end - span.offset, len(rows))
            if first < last:
                parts.append(rows[first:last])
        return parts

    def in_chunks(
        self,
        size: Callable[[], int],
        dtype: torch.dtype = torch.int64,
        furthest: int | None = None,
    ) -> Tensor:
        """Compute the prompt chunk by chunk as a model runner does; return its positions.

        The first runner keeps the tensor that it was given, and computes it again after a
        preemption; the second stores 32-bit integers.
        """
        positions, ahead = prompt_positions(len(self.ids), self.spans, AXES, furthest)
        is_first = dtype == torch.int64
        positions = positions if is_first else positions.to(dtype)
        computed = 0
        while computed < len(self.ids):
            end = min(len(self.ids), computed + size())
            gathered = self.gathered(computed, end)
            for _ in range(2 if is_first else 1):
                ahead_by = write(gathered, positions, computed)
            computed = end
        assert ahead_by == ahead
        return positions


LONG = {
    "an image": [item(IMAGE, 1, 150, 140, keep=3000)],
    "a video": [item(VIDEO, 600, 6, 6, 2.5, keep=2500)],
    "a mixture": [
        item(IMAGE, 1, 90, 80, keep=500, seed=1),
        item(VIDEO, 300, 5, 7, 25.0, keep=900, seed=2),
        item(IMAGE, 1, 20, 30),
        item(VIDEO, 40, 4, 6),
        item(IMAGE, 1, 70, 60, keep=1, seed=3),
    ],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LONG)
def test_positions_in_prompts_of_twenty_thousand_tokens_equal_those_without_pruning(
    name: str, dtype: torch.dtype
) -> None:
    items = LONG[name]
    whole = Prompt.of([Item(each.visual, each.grid, None) for each in items], dtype=dtype)
    assert len(whole.ids) >= 20_000
    expected, ahead = prompt_positions(len(whole.ids), whole.spans)
    prompt = Prompt.of(items, dtype=dtype)
    draw = np.random.default_rng(0)
    for size in (lambda: 10**6, lambda: 512, lambda: int(draw.integers(1, 900))):
        positions = prompt.in_chunks(size)
        assert positions.equal(expected[:, prompt.indices_in_the_whole()])
    # Positions of the answer continue as without pruning.
    _, own = prompt_positions(len(prompt.ids), prompt.spans)
    assert own + len(prompt.ids) == ahead + len(whole.ids)
    assert prompt.in_chunks(lambda: 512, torch.int32).equal(positions.int())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positions_of_adjacent_items_at_both_ends_of_a_prompt(dtype: torch.dtype) -> None:
    items = [
        item(IMAGE, 1, 9, 7, keep=5, seed=1),
        item(IMAGE, 1, 3, 4),
        item(IMAGE, 1, 9, 7, keep=1, seed=2),
        item(IMAGE, 1, 2, 9, keep=1, seed=3),
        item(VIDEO, 4, 3, 3, keep=11, seed=4),
    ]
    whole = Prompt.of([Item(each.visual, each.grid, None) for each in items], text=0)
    expected, ahead = prompt_positions(len(whole.ids), whole.spans)
    prompt = Prompt.of(items, text=0)
    for size in (1, 2, 7, 1000):
        positions = prompt.in_chunks(lambda size=size: size, dtype)  # type: ignore[misc]
        assert positions.equal(expected[:, prompt.indices_in_the_whole()].to(dtype)), size
    _, own = prompt_positions(len(prompt.ids), prompt.spans)
    assert own + len(prompt.ids) == ahead + len(whole.ids)


def test_mrope_positions_stay_inside_the_rotary_table() -> None:
    """Random prompts with items that would exceed it: scaled down, in order, from some item on."""
    draw = np.random.default_rng(5)
    shortened = 0
    for _ in range(1000):
        items = []
        for _ in range(int(draw.integers(1, 9))):
            steps = int(draw.choice([1, 1, 6]))
            rows, columns = (int(side) for side in draw.integers(1, 40, size=2))
            total = steps * rows * columns
            is_whole = total == 1 or (total < 100 and draw.random() < 0.3)
            keep = None if is_whole else int(draw.integers(1, min(total, 12)))
            items.append(item(IMAGE, steps, rows, columns, float(draw.choice([1, 9])), keep=keep))
        prompt = Prompt.of(items, text=int(draw.integers(0, 4)), dtype=torch.float32)
        full = prompt.in_chunks(lambda: 10**6)
        tokens = len(prompt.ids)
        furthest = int(draw.integers(0, 200))
        _, ahead = prompt_positions(tokens, prompt.spans, AXES, furthest)
        own = prompt.in_chunks(lambda: int(draw.integers(1, 50)), furthest=furthest)
        assert ahead <= furthest
        assert int(own.max()) < tokens + furthest
        assert int(own.min()) >= 0
        is_same = own.eq(full).all(dim=0)
        # Positions up to the first item that does not fit are unchanged.
        first = tokens if is_same.all() else int(is_same.int().argmin())
        shortened += first < tokens
        if first < tokens:
            so_far = [span for span in prompt.spans if span.offset <= first]
            assert sum(span.extent - len(span.places) for span in so_far) > furthest
        for span, rows in zip(prompt.spans, prompt.embeddings, strict=True):
            end = span.offset + len(rows)
            was, now = full[:, span.offset : end], own[:, span.offset : end]
            for axis in range(AXES):
                order = was[axis].argsort(stable=True)
                assert (now[axis][order].diff() >= 0).all()
            if span.offset:
                before = int(own[:, : span.offset].max())
                assert int(now.min()) > before
            if end < tokens and prompt.ids[end] != IMAGE:
                assert int(own[0, end]) > int(now.max())
    assert shortened > 300


def test_positions_in_chunks_of_one_token() -> None:
    items = [item(IMAGE, 1, 4, 5, keep=3), item(VIDEO, 3, 2, 2, keep=4), item(IMAGE, 1, 2, 2)]
    prompt = Prompt.of(items, text=1)
    whole = Prompt.of([Item(each.visual, each.grid, None) for each in items], text=1)
    expected, _ = prompt_positions(len(whole.ids), whole.spans)
    assert prompt.in_chunks(lambda: 1).equal(expected[:, prompt.indices_in_the_whole()])


def test_a_drafter_that_reads_one_token_ahead_changes_no_position() -> None:
    prompt = Prompt.of([item(IMAGE, 1, 6, 6, keep=10), item(VIDEO, 3, 3, 3, keep=9)], text=3)
    final = prompt.in_chunks(lambda: 10**6)
    for computed in range(len(prompt.ids) - 1):
        positions, _ = prompt_positions(len(prompt.ids), prompt.spans)
        write(prompt.gathered(0, len(prompt.ids)), positions, 0)
        write(prompt.gathered(computed + 1, len(prompt.ids)), positions, computed)
        assert positions.equal(final), computed


def test_bfloat16_alone_cannot_represent_the_positions() -> None:
    """The reason to split positions into digits: vLLM's own channels lose them."""
    positions = torch.arange(20_000)
    lost = positions.to(torch.bfloat16).long() != positions
    assert lost.float().mean() > 0.9
    rows = torch.zeros(20_000, WIDTH, dtype=torch.bfloat16)
    sent = with_places(rows, positions[:, None].expand(-1, 3))
    assert sent.shape == (20_000, WIDTH + CHANNELS)
    span = Span.of_grid(1, 20_000, np.arange(20_001)[:, None].repeat(3, axis=1))
    start, _ = prompt_positions(20_002, [span])
    write([sent], start, 0)
    assert start[0, 1:-1].equal(positions + 1)


def test_positions_of_whole_prompts_equal_those_of_vllm() -> None:
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    grids = [(IMAGE, 1, 8, 6, 1.0), (VIDEO, 5, 4, 4, 2.5), (IMAGE, 1, 2, 20, 1.0)]
    prompt = Prompt.of([item(*grid) for grid in grids])
    stand_in = SimpleNamespace(
        iter_mm_grid_thw=lambda features: [
            (span.offset, *grid[1:]) for span, grid in zip(features, grids, strict=True)
        ]
    )
    theirs, ahead = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions(
        stand_in,  # type: ignore[arg-type]
        prompt.ids,
        prompt.spans,  # type: ignore[arg-type]
    )
    ours, own = prompt_positions(len(prompt.ids), prompt.spans)
    assert ours.equal(theirs)
    assert own == ahead


class LineModel(PositionedModel):
    """A model with an ordinary rotary embedding."""

    axes = 1
    _width = WIDTH


@pytest.mark.parametrize("allowed", [None, 40])
def test_one_axis_on_the_second_model_runner(allowed: int | None) -> None:
    """Two adjacent images and one at the end, with all and with a part of their gaps."""
    kept = [torch.tensor([3, 8, 9]), torch.tensor([0, 63]), torch.tensor([20, 50])]
    gaps = [64 - len(each) for each in kept]
    names = [item_name(bytes(32), gap, gap) for gap in gaps]
    if allowed is not None:
        names = [f"{name}~{allowed}" for name in names]
    offsets = [2, 5, 10]
    features = [
        SimpleNamespace(
            identifier=name,
            mm_position=PlaceholderRange(offset=offset, length=len(each)),
        )
        for name, offset, each in zip(names, offsets, kept, strict=True)
    ]
    model = LineModel()
    ids = [1] * 12
    start, ahead = model.get_mrope_input_positions(ids, features)
    rows = [
        model.placed(torch.randn(len(each), WIDTH), each, gap)
        for each, gap in zip(kept, gaps, strict=True)
    ]
    if allowed is None:
        expected = [0, 1, 5, 10, 11, 66, 129, 130, 131, 132, 153, 183]
        assert ahead == 2 + 64 + 64 + 3 + 64 - 12
    else:
        # Index plus the gap before it: the dropped tokens, times 40 of each 61 or 62.
        first = [2 + 3 * 40 // 61, 3 + 7 * 40 // 61, 4 + 7 * 40 // 61]
        last = [93 + 20 * 40 // 62 - 3 + 0, 94 + 49 * 40 // 62 - 3]
        expected = [0, 1, *first, 45, 46 + 40, 87, 88, 89, *last]
        assert ahead == 3 * 40
    for size in (1, 3, 100):
        state = RopeStandIn(start)
        run_on_the_second_runner(model, state, ids, features, rows, size)
        assert state.positions[0].tolist() == expected, size
        assert state.delta == ahead, size


def test_text_inside_an_item_keeps_its_position() -> None:
    """An image between begin and end tokens, which have no embeddings from the encoder."""
    mask = torch.tensor([False, True, True, False])
    feature = SimpleNamespace(
        identifier=item_name(bytes(32), 62, 62),
        mm_position=PlaceholderRange(offset=1, length=4, is_embed=mask),
    )
    model = LineModel()
    positions, ahead = model.get_mrope_input_positions([1] * 6, [feature])
    rows = model.placed(torch.zeros(2, WIDTH), torch.tensor([10, 40]), 62)
    (stripped,), recomputed, again = model.recompute_mrope_positions([1] * 6, [rows], positions, 0)
    assert stripped.shape == (2, WIDTH)
    assert recomputed[0].tolist() == [0, 1, 12, 42, 66, 67]
    assert ahead == again == 62


def test_the_second_model_runner_computes_the_same_positions() -> None:
    """vLLM's second model runner with its own pruner; its state, which needs a GPU, is replaced."""
    prompt = Prompt.of([item(IMAGE, 1, 30, 40, keep=50), item(VIDEO, 90, 3, 3, 2.0, keep=95)])
    expected = prompt.in_chunks(lambda: 10**6)
    start, ahead = prompt_positions(len(prompt.ids), prompt.spans)
    model = LineModel()
    model.axes, model._width = AXES, 0
    features = [
        SimpleNamespace(mm_position=PlaceholderRange(offset=span.offset, length=len(span.places)))
        for span in prompt.spans
    ]
    state = RopeStandIn(start)
    pruner = run_on_the_second_runner(model, state, prompt.ids, features, prompt.embeddings, 37)
    assert state.positions.equal(expected.int())
    assert state.delta == ahead
    assert [each.shape[1] for each in pruner.strip(prompt.embeddings)] == [WIDTH, WIDTH]


class RopeStandIn:
    """Replaces the state of the second runner, which has 32-bit integers on a GPU."""

    def __init__(self, start: Tensor) -> None:
        self.positions = start.int()
        self.delta = 0

    def read_prefill_positions(self, request: int, length: int) -> Tensor:
        return self.positions[:, :length]

    def update_prefill_positions(self, request: int, positions: Tensor, delta: int) -> None:
        self.positions[:, : positions.shape[1]].copy_(positions)
        self.delta = delta


def run_on_the_second_runner(
    model: Any, state: Any, ids: list[int], features: list[Any], embeddings: Any, chunk: int
) -> Any:
    """Compute a prompt with the pruner of vLLM's second runner; return the pruner."""
    pytest.importorskip("triton")
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    cache: Any = SimpleNamespace(mm_features={"a": features})
    pruner = MultiModalPruner(model, state, cache, WIDTH)
    requests: Any = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=torch.tensor([ids], dtype=torch.int32))
    )
    computed = 0
    while computed < len(ids):
        end = min(len(ids), computed + chunk)
        gathered = []
        for each, rows in zip(features, embeddings, strict=True):
            offset = each.mm_position.offset
            first, last = max(computed - offset, 0), min(end - offset, len(rows))
            if first < last:
                gathered.append(rows[first:last])
        batch: Any = SimpleNamespace(
            req_ids=["a"],
            idx_mapping_np=np.array([0]),
            prefill_len_np=np.array([len(ids)]),
            num_computed_prefill_tokens_np=np.array([computed]),
            num_scheduled_tokens=np.array([end - computed]),
        )
        cleaned = pruner.recompute(gathered, batch, requests)
        assert all(each.shape[1] == WIDTH for each in cleaned)
        computed = end
    return pruner
