# SPDX-License-Identifier: Apache-2.0
"""M-RoPE positions of what is kept, against those of the whole prompt, index by index."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from flashvlm_vllm.models.positions import (
    CHANNELS,
    Span,
    grid_positions,
    has_text_around,
    prompt_positions,
    with_positions,
    without_positions,
    written,
)

IMAGE, VIDEO = 7, 8
WIDTH = 4


@dataclass
class Item:
    """An image or a video of a prompt, and which of its tokens stay (None: it is not pruned)."""

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
    """Text and items in turn; text comes first and last."""

    ids: list[int]
    spans: list[Span]
    embeddings: list[Tensor]
    items: list[Item]

    @classmethod
    def of(cls, items: list[Item], text: int = 5, dtype: torch.dtype = torch.bfloat16) -> "Prompt":
        ids, spans, embeddings = [1] * text, [], []
        for each in items:
            spans.append(Span(len(ids), each.length, each.positions))
            ids += [each.visual] * each.length + [2] * text
            rows = torch.randn(each.length, WIDTH).to(dtype)
            embeddings.append(
                without_positions(rows)
                if each.kept is None
                else with_positions(rows, torch.from_numpy(each.positions)[each.kept])
            )
        return cls(ids, spans, embeddings, items)

    def indices_in_the_whole(self) -> Tensor:
        """Which token of the unpruned prompt each token of this one is."""
        indices, index, shift = [], 0, 0
        for span, each in zip(self.spans, self.items, strict=True):
            indices.append(torch.arange(index, span.offset) + shift)
            total = len(each.positions)
            kept = torch.arange(total) if each.kept is None else each.kept
            indices.append(span.offset + shift + kept)
            shift += total - each.length
            index = span.offset + span.length
        indices.append(torch.arange(index, len(self.ids)) + shift)
        return torch.cat(indices)

    def in_chunks(self, size: Callable[[], int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Compute the prompt chunk by chunk as a model runner does; return its positions."""
        positions, _ = prompt_positions(len(self.ids), self.spans)
        positions = positions.to(dtype)
        computed = 0
        while computed < len(self.ids):
            end = min(len(self.ids), computed + size())
            gathered = []
            for span, rows in zip(self.spans, self.embeddings, strict=True):
                first, last = max(computed - span.offset, 0), min(end - span.offset, span.length)
                if first < last:
                    gathered.append(rows[first:last])
            ids = torch.tensor(self.ids)
            for _ in range(2):  # again, as after a preemption
                positions = written(ids, (IMAGE, VIDEO), gathered, positions, computed)
            computed = end
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
def test_twenty_thousand_tokens_are_where_they_are_without_pruning(
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
    # Answers go on where they would without pruning.
    _, own = prompt_positions(len(prompt.ids), prompt.spans)
    assert own + len(prompt.ids) == ahead + len(whole.ids)
    assert prompt.in_chunks(lambda: 512, torch.int32).equal(positions.int())


def test_one_token_at_a_time() -> None:
    items = [item(IMAGE, 1, 4, 5, keep=3), item(VIDEO, 3, 2, 2, keep=4), item(IMAGE, 1, 2, 2)]
    prompt = Prompt.of(items, text=1)
    whole = Prompt.of([Item(each.visual, each.grid, None) for each in items], text=1)
    expected, _ = prompt_positions(len(whole.ids), whole.spans)
    assert prompt.in_chunks(lambda: 1).equal(expected[:, prompt.indices_in_the_whole()])


def test_a_drafter_that_looks_a_token_ahead_changes_nothing() -> None:
    prompt = Prompt.of([item(IMAGE, 1, 6, 6, keep=10), item(VIDEO, 3, 3, 3, keep=9)], text=3)
    final = prompt.in_chunks(lambda: 10**6)
    ids = torch.tensor(prompt.ids)
    for computed in range(len(prompt.ids) - 1):
        ahead = computed + 1
        gathered = [
            rows[max(ahead - span.offset, 0) :]
            for span, rows in zip(prompt.spans, prompt.embeddings, strict=True)
            if ahead < span.offset + span.length
        ]
        assert written(ids, (IMAGE, VIDEO), gathered, final, computed).equal(final), computed


def test_bfloat16_itself_would_lose_them() -> None:
    """The reason for digits: what vLLM's own channels make of the same positions."""
    positions = torch.arange(20_000)
    lost = positions.to(torch.bfloat16).long() != positions
    assert lost.float().mean() > 0.9
    rows = torch.zeros(20_000, WIDTH, dtype=torch.bfloat16)
    sent = with_positions(rows, positions[:, None].expand(-1, 3))
    assert sent.shape == (20_000, WIDTH + CHANNELS)
    start = torch.zeros(3, 20_002, dtype=torch.int64)
    ids = torch.tensor([1] + [IMAGE] * 20_000 + [1])
    assert written(ids, (IMAGE,), [sent], start, 0)[0, 1:-1].equal(positions + 1)


def test_positions_of_whole_prompts_are_those_of_vllm() -> None:
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


def test_pruned_items_need_text_behind_them_and_between() -> None:
    other = SimpleNamespace(offset=10, length=4)
    assert has_text_around(0, 5, 20, [other])
    assert has_text_around(15, 4, 20, [other])
    assert not has_text_around(15, 5, 20, [other])
    assert not has_text_around(14, 3, 20, [other])
    assert not has_text_around(5, 5, 20, [other])


def test_the_other_runner_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's second model runner, its own pruner; a stand-in for the state that needs a GPU."""
    pytest.importorskip("triton")
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    from flashvlm_vllm.models.qwen2_vl import QwenSelection

    prompt = Prompt.of([item(IMAGE, 1, 30, 40, keep=50), item(VIDEO, 90, 3, 3, 2.0, keep=95)])
    expected = prompt.in_chunks(lambda: 10**6)
    start, ahead = prompt_positions(len(prompt.ids), prompt.spans)

    class State:
        positions = start.int()
        delta = 0

        def read_prefill_positions(self, request: int, length: int) -> Tensor:
            return self.positions[:, :length]

        def update_prefill_positions(self, request: int, positions: Tensor, delta: int) -> None:
            self.positions[:, : positions.shape[1]].copy_(positions)
            self.delta = delta

    model: Any = SimpleNamespace(config=SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO))
    model.recompute_mrope_positions = lambda **given: QwenSelection.recompute_mrope_positions(
        model, **given
    )
    state = State()
    features = [SimpleNamespace(mm_position=position(span)) for span in prompt.spans]
    pruner = MultiModalPruner(
        model,
        state,  # type: ignore[arg-type]
        SimpleNamespace(mm_features={"a": features}),  # type: ignore[arg-type]
        WIDTH,
    )
    requests: Any = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=torch.tensor([prompt.ids], dtype=torch.int32))
    )
    computed, chunk = 0, 37
    while computed < len(prompt.ids):
        end = min(len(prompt.ids), computed + chunk)
        gathered = []
        for span, rows in zip(prompt.spans, prompt.embeddings, strict=True):
            first, last = max(computed - span.offset, 0), min(end - span.offset, span.length)
            if first < last:
                gathered.append(rows[first:last])
        batch: Any = SimpleNamespace(
            req_ids=["a"],
            idx_mapping_np=np.array([0]),
            prefill_len_np=np.array([len(prompt.ids)]),
            num_computed_prefill_tokens_np=np.array([computed]),
            num_scheduled_tokens=np.array([end - computed]),
        )
        cleaned = pruner.recompute(gathered, batch, requests)
        assert all(each.shape[1] == WIDTH for each in cleaned)
        computed = end
    assert state.positions.equal(expected.int())
    assert state.delta == ahead
    assert [each.shape[1] for each in pruner.strip(prompt.embeddings)] == [WIDTH, WIDTH]


def position(span: Span) -> Any:
    from vllm.multimodal.inputs import PlaceholderRange

    return PlaceholderRange(offset=span.offset, length=span.length)
