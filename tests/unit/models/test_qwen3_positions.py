# SPDX-License-Identifier: Apache-2.0
"""Positions of Qwen3-VL's videos, including timestamps, against vLLM's own, index by index."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from flashvlm_vllm.models.layouts.clips import clip_positions
from flashvlm_vllm.models.qwen3_vl import Qwen3Model
from flashvlm_vllm.position_scheme import AXES
from flashvlm_vllm.worker.positions import channels

IMAGE, VIDEO, START, END = 901, 902, 903, 904
CONFIG = SimpleNamespace(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    vision_config=SimpleNamespace(spatial_merge_size=2),
)


class Tokenizer:
    """One token for each character; timestamps have different lengths."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(each) for each in text]


class Model(Qwen3Model):
    """The parts of the model that computing positions needs."""

    axes = AXES

    def __init__(self) -> None:
        self.config = CONFIG
        self._tokenizer = Tokenizer()
        self.visual = SimpleNamespace(spatial_merge_size=2)
        self.language_model = SimpleNamespace(
            embed_input_ids=lambda ids: torch.stack([ids, ids], dim=1).to(torch.bfloat16),
            modules=list,
        )


def feature(modality: str, offset: int, length: int, grid: tuple[int, int, int]) -> Any:
    return SimpleNamespace(
        modality=modality,
        identifier="item",
        mm_position=SimpleNamespace(offset=offset, length=length),
        data={f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(grid))},
    )


def video_text(model: Model, steps: int) -> tuple[tuple[float, ...], list[list[int]]]:
    seconds = tuple(0.7 * number for number in range(steps))
    frames: list[list[int]] = [[]]
    for token in model.text_of(seconds):
        frames[-1].append(token)
        if token == END:
            frames.append([])
    return seconds, frames[:-1]


ITEMS = [
    ("image", (1, 60, 44), 100),
    ("video", (400, 12, 16), 3000),
    ("image", (1, 20, 24), None),
    ("video", (3, 8, 6), None),
    ("video", (40, 8, 10), 40),
]


@pytest.mark.parametrize("size", [10**6, 512, 37])
def test_kept_tokens_and_timestamps_have_the_positions_they_have_without_pruning(size: int) -> None:
    model = Model()
    draw = torch.Generator().manual_seed(0)
    whole, short = [5] * 4, [5] * 4
    whole_features, short_features, rows, stay = [], [], [], [*range(4)]
    for modality, (steps, high, wide), budget in ITEMS:
        tokens = high * wide // 4
        total = steps * tokens
        kept = torch.arange(total)
        if budget is not None:
            kept = torch.randperm(total, generator=draw)[:budget].sort().values
        width = torch.zeros(len(kept), 6, dtype=torch.bfloat16)
        first = len(whole)
        if modality == "image":
            seconds, places = None, kept
            ids, own = [IMAGE] * total, [IMAGE] * len(kept)
        else:
            seconds, frames = video_text(model, steps)
            ids = [x for frame in frames for x in [*frame[:-1], *[VIDEO] * tokens, frame[-1]]]
            is_visual = torch.tensor(ids) == VIDEO
            visual, text = is_visual.nonzero().flatten(), (~is_visual).nonzero().flatten()
            places = torch.cat([text, visual[kept]]).sort().values
            lead = len(frames[0]) - 1
            words = [x for frame in frames for x in frame]
            own = ids if budget is None else [*words[:lead], *[VIDEO] * budget, *words[lead:]]
        stay += (first + places).tolist()
        whole_features.append(feature(modality, first, len(ids), (steps, high, wide)))
        short_features.append(feature(modality, len(short), len(own), (steps, high, wide)))
        placed = model.laid_out(width, kept, (steps, high, wide), seconds)
        if budget is None:  # rows of a whole item have no positions, and no text
            placed = torch.nn.functional.pad(width, (0, channels(AXES)))
        rows.append(placed)
        stay += range(first + len(ids), first + len(ids) + 3)
        whole += [*ids, 5, 5, 5]
        short += [*own, 5, 5, 5]
    assert len(whole) > 20_000
    expected, ahead = Qwen3VLForConditionalGeneration._get_mrope_input_positions(
        whole, whole_features, CONFIG
    )
    unpruned, own_ahead = model.get_mrope_input_positions(whole, whole_features)
    assert unpruned.equal(expected)
    assert own_ahead == ahead

    positions, delta = model.get_mrope_input_positions(short, short_features)
    assert delta + len(short) == ahead + len(whole)
    for computed in range(0, len(short), size):
        end = min(len(short), computed + size)
        gathered = []
        for each, all_rows in zip(short_features, rows, strict=True):
            offset, length = each.mm_position.offset, each.mm_position.length
            a, b = max(computed - offset, 0), min(end - offset, length)
            if a >= b:
                continue
            if len(all_rows) != length:  # a whole video has rows only for its visual tokens
                is_row = np.array(short[offset : offset + length]) == VIDEO
                a, b = int(is_row[:a].sum()), int(is_row[:b].sum())
            if a < b:
                gathered.append(all_rows[a:b])
        for _ in range(2):  # a second time, as after a preemption
            cut, positions, delta = model.recompute_mrope_positions(
                short, gathered, positions, computed
            )
        assert all(each.shape[1] == 6 for each in cut)
    assert positions.equal(expected[:, stay])
    assert delta + len(short) == ahead + len(whole)


def test_a_drafter_that_reads_one_token_ahead_changes_no_position() -> None:
    model = Model()
    seconds, frames = video_text(model, 3)
    words = [x for frame in frames for x in frame]
    lead = len(frames[0]) - 1
    ids = [5, 5, *words[:lead], *[VIDEO] * 4, *words[lead:], 5, 5]
    rows = model.laid_out(torch.zeros(4, 6), torch.tensor([1, 5, 6, 11]), (3, 4, 4), seconds)
    features = [feature("video", 2, len(rows), (3, 4, 4))]
    positions, _ = model.get_mrope_input_positions(ids, features)
    before = positions.clone()
    _, expected, _ = model.recompute_mrope_positions(ids, [rows], positions, 0)
    expected = expected.clone()
    assert not expected.equal(before)
    for computed in range(2, 2 + len(rows) - 1):
        ahead = rows[computed + 1 - 2 :]
        _, again, _ = model.recompute_mrope_positions(ids, [ahead], positions, computed)
        assert again.equal(expected)


def test_positions_of_a_clip_of_one_frame() -> None:
    positions, is_visual = clip_positions([2], 3, 1, 3)
    assert is_visual.tolist() == [False, False, True, True, True, False]
    assert positions.tolist() == [[0] * 3, [1] * 3, [2, 2, 2], [2, 2, 3], [2, 2, 4], [5] * 3]


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_vllms_own_video_pruning_gets_exact_positions_without_a_budget(method: str) -> None:
    from vllm.multimodal.video_prune import evs, vidcom2

    model = Model()
    model._video_pruning = (method, 0.5)
    grid, rate = (3, 8, 8), 0.5
    seconds, frames = video_text(model, 3)
    words = [x for frame in frames for x in frame]
    lead = len(frames[0]) - 1
    count = (vidcom2 if method == "vidcom2" else evs).compute_retained_tokens_count(
        tokens_per_frame=16, num_frames=3, q=rate
    )
    drawn = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    rows = model._left_to_vllm(drawn, grid, seconds, "video")
    assert len(rows) == len(words) + count < len(words) + 48

    ids = [5, *words[:lead], *[VIDEO] * count, *words[lead:], 5]
    positions, _ = model.get_mrope_input_positions(ids, [feature("video", 1, len(rows), grid)])
    (cut,), positions, _ = model.recompute_mrope_positions(ids, [rows], positions, 0)
    expected, is_visual = clip_positions([len(x) for x in _before(frames)], len(words), 4, 4)
    # Text has its id in each channel, visual tokens have the random numbers.
    whole = torch.full((len(expected), 6), 0.0)
    whole[torch.from_numpy(is_visual)] = drawn
    whole[torch.from_numpy(~is_visual), :2] = torch.tensor(words).float()[:, None].expand(-1, 2)
    place = {tuple(row): number for number, row in enumerate(whole.tolist()) if is_visual[number]}
    texts = iter(np.flatnonzero(~is_visual))
    for row, position in zip(cut.tolist(), positions.T[1:-1], strict=True):
        number = place.get(tuple(row))
        number = next(texts) if number is None else number
        assert position.tolist() == (expected[number] + 1).tolist()


def _before(frames: list[list[int]]) -> list[list[int]]:
    """Return for each frame the text before its visual tokens."""
    words: list[int] = []
    lists = []
    for frame in frames:
        lists.append([*words, *frame[:-1]])
        words += frame
    return lists
