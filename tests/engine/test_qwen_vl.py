# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL against Transformers: kept tokens keep their positions."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from torch import Tensor

from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.worker.positioned_model import PositionedModel
from testing.photo import photo
from testing.tiny.qwen_vl import END, IMAGE, START, TURN, VIDEO, build_qwen_vl
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import TransformersModel

QUESTIONS = ("what color is the suit?", "where is the flag?")
Video = NDArray[np.uint8]


def clip(*names: str) -> Video:
    return np.stack([np.array(photo(name).resize((120, 100))) for name in names])


CLIP = clip(*["astronaut"] * 5, "cat", "coffee", "cat")
PICTURE = photo("astronaut").resize((200, 190))


ROUNDS = Version(transformers.__version__) < Version("5.18")
NO_REFERENCE = "Transformers before 5.18 rounds the seconds between steps down; vLLM does not"
FPS = 3.2
"""Four time steps do not exceed rows and columns. Text after a longer video has smaller positions
in this release of Transformers than in vLLM, because Transformers ignores the time."""


def with_metadata(video: Video) -> tuple[Video, dict[str, Any]]:
    count = len(video)
    return video, {
        "fps": FPS,
        "duration": count / FPS,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


@dataclass
class Served:
    """One version of the model served by vLLM, and its reference in Transformers."""

    engine: Engine
    reference: "Reference"
    version: str

    def request(
        self,
        question: str,
        budget: object,
        images: Sequence[Any] = (),
        videos: Sequence[Video] = (),
    ) -> dict[str, Any]:
        given = [with_metadata(each) if self.version == "2.5" else each for each in videos]
        data = {"image": list(images)} if images else {}
        data |= {"video": given} if videos else {}
        return {
            "prompt": text(question, len(images), len(videos)),
            "multi_modal_data": data,
            **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
        }

    def run(self, *requests: dict[str, Any], tokens: int = 8) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens)
        return list(self.engine.llm.generate(list(requests), sampling, use_tqdm=False))  # type: ignore[arg-type]

    def kept(self, items: int) -> list[list[int]]:
        """Return the kept tokens of the last items, oldest first."""
        return [each["kept"] for each in self.engine.kept()[-items:]]


def text(question: str, images: int, videos: int) -> str:
    marks = f"{START}{IMAGE}{END}" * images + f"{START}{VIDEO}{END}" * videos
    system = f"{TURN}system\nYou are careful.<|im_end|>\n"
    return f"{system}{TURN}user\n{marks}{question}<|im_end|>\n{TURN}assistant\n"


class Reference(TransformersModel):
    """Transformers' model, float32: positions and embeddings of the whole prompt."""

    @torch.inference_mode()
    def answer(
        self,
        prompt: str,
        kept: Sequence[Sequence[int]],
        images: Sequence[Any],
        videos: Sequence[Video],
        tokens: int,
    ) -> list[int]:
        """Return greedy ids when only the ``kept`` tokens of each item remain, in their places."""
        given: dict[str, Any] = {"images": list(images)} if images else {}
        if videos:
            given["videos"] = list(videos)
            metadata = [dict(with_metadata(video)[1]) for video in videos]
            for each in metadata:
                del each["do_sample_frames"]
            given["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
        inputs = self.processor(text=[prompt], return_tensors="pt", **given)
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        shapes = {name: inputs[name] for name in names if name in inputs}
        ids = inputs["input_ids"]
        positions, _ = self.model.model.get_rope_index(ids, inputs["mm_token_type_ids"], **shapes)
        embeddings = self.model.get_input_embeddings()(ids)
        stay = torch.ones(ids.shape[1], dtype=torch.bool)
        rows: list[Tensor] = []
        config = self.model.config
        if images:
            rows += self.model.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"]
            ).pooler_output
        if videos:
            rows += self.model.model.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"]
            ).pooler_output
        visual = torch.isin(ids[0], torch.tensor([config.image_token_id, config.video_token_id]))
        index = visual.nonzero().flatten()
        embeddings[0, index] = torch.cat(rows)
        for each, places in zip(rows, kept, strict=True):
            mine, index = index[: len(each)], index[len(each) :]
            stay[mine] = False
            stay[mine[torch.tensor(places)]] = True
        following = int(positions.max()) + 1
        embeddings, positions = embeddings[:, stay], positions[:, :, stay]
        answer_ids: list[int] = []
        for number in range(tokens):
            logits = self.model(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False
            ).logits
            answer_ids.append(int(logits[0, -1].argmax()))
            word = self.model.get_input_embeddings()(torch.tensor([[answer_ids[-1]]]))
            embeddings = torch.cat([embeddings, word], dim=1)
            positions = torch.cat([positions, torch.full((3, 1, 1), following + number)], dim=2)
        return answer_ids


@pytest.fixture(scope="module", params=["2.5", "2"])
def served(request: pytest.FixtureRequest, start_engine: StartEngine) -> Iterator[Served]:
    version = request.param
    path = build_qwen_vl(REPOSITORY / ".models" / f"qwen{version}-vl", version)
    # A chunk is shorter than most prompts here, so they are prefilled in several chunks.
    with start_engine(
        path,
        max_num_batched_tokens=64,
        block_size=32,
        limit_mm_per_prompt={"image": 3, "video": 2},
    ) as engine:
        yield Served(engine, Reference(path), version)


@pytest.mark.parametrize(
    ("images", "videos", "lengths"),
    [
        ([PICTURE], [], [49]),
        ([], [CLIP], [64]),
        ([], [CLIP[:1]], [16]),
        ([PICTURE, photo("cat").resize((40, 300))], [CLIP[2:]], [49, 11, 48]),
    ],
    ids=["image", "video", "one frame", "images and video"],
)
def test_answers_equal_transformers_with_the_same_tokens_at_the_same_positions(
    served: Served, images: list[Any], videos: list[Video], lengths: list[int]
) -> None:
    if served.version == "2.5" and ROUNDS and any(len(video) > 1 for video in videos):
        pytest.skip(NO_REFERENCE)
    for budget in (None, 4, 10):
        served.engine.clear_caches()
        (output,) = served.run(served.request(QUESTIONS[0], budget, images, videos))
        kept = [list(range(length)) for length in lengths]
        if budget is not None:
            kept = served.kept(len(lengths))
            assert [len(each) for each in kept] == [min(budget, length) for length in lengths]
        ids = token_ids(output)
        prompt = text(QUESTIONS[0], len(images), len(videos))
        assert ids == served.reference.answer(prompt, kept, images, videos, len(ids)), budget


def test_the_important_half_equals_that_from_transformers_attention(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.engine.clear_caches()
    served.run(served.request(QUESTIONS[0], 20, [PICTURE]), tokens=1)
    record = served.engine.kept()[-1]
    reference = served.reference
    inputs = reference.processor.image_processor([PICTURE], return_tensors="pt")
    grid = inputs["image_grid_thw"]
    saliency = received(reference.model, inputs["pixel_values"], grid, monkeypatch)
    with torch.inference_mode():
        features = reference.model.model.get_image_features(inputs["pixel_values"], grid)
        words = reference.model.get_input_embeddings()(torch.tensor(record["query"]))
        scores = fused_scores(features.pooler_output[0], saliency, words)
    assert set(scores.topk(10).indices.tolist()) <= set(record["kept"])
    # The question is the user's text, without the template and the system prompt.
    tokenizer = reference.processor.tokenizer
    assert record["query"] == tokenizer(QUESTIONS[0], add_special_tokens=False).input_ids


def received(model: Any, pixels: Tensor, grid: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Attention received in the tower's last layer, mean over heads and patches, by token."""
    visual = model.model.visual
    module = sys.modules[type(visual).__module__]
    attend, maps = module.eager_attention_forward, []  # type: ignore[attr-defined]

    def recording(attention: Any, *given: Any, **named: Any) -> Any:
        output, weights = attend(attention, *given, **named)
        if attention is visual.blocks[-1].attn:
            maps.append(weights)
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", recording)
    with torch.inference_mode():
        model.model.get_image_features(pixels, grid)
    (weights,) = maps
    tokens = weights[0].mean(dim=0).sum(dim=0).view(-1, 4).mean(dim=1)
    if hasattr(visual, "window_size"):
        by_window, _ = module.get_vision_window_index(  # type: ignore[attr-defined]
            grid, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        tokens = tokens[by_window.argsort()]
    return tokens


def test_requests_in_a_mixed_batch_answer_as_alone(served: Served) -> None:
    requests = [
        served.request(question, budget, images, videos)
        for question in QUESTIONS
        for budget, images, videos in (
            (None, [PICTURE], []),
            (9, [PICTURE], []),
            (12, [PICTURE, photo("cat")], [CLIP]),
            (None, [], [CLIP]),
            (0.25, [], [CLIP, CLIP[4:]]),
        )
    ]
    alone = []
    for each in requests:
        served.engine.clear_caches()
        alone.append(token_ids(served.run(each)[0]))
    served.engine.clear_caches()
    together = served.run(*requests)
    assert [token_ids(each) for each in together] == alone
    # Again from the caches: the next answer uses cached blocks.
    again = served.run(*requests)
    assert [token_ids(each) for each in again] == alone
    assert any(each.num_cached_tokens >= 32 for each in again)
    assert alone[1] != alone[6]


def test_prefix_cache_hits_and_a_budget_of_all_tokens(served: Served) -> None:
    served.engine.clear_caches()
    stock, whole = (
        served.run(served.request(QUESTIONS[0], budget, [PICTURE]))[0] for budget in (None, 49)
    )
    assert token_ids(stock) == token_ids(whole)
    assert whole.num_cached_tokens >= 49
    first, same, other = (
        served.run(served.request(question, 40, [PICTURE]))[0]
        for question in (QUESTIONS[0], *QUESTIONS)
    )
    assert len(stock.prompt_token_ids) - len(first.prompt_token_ids) == 9
    assert token_ids(first) == token_ids(same)
    assert same.num_cached_tokens >= 40
    assert other.num_cached_tokens < 40


@pytest.mark.parametrize(
    "prompt", [f"what? {START}{VIDEO}", f"{IMAGE}{VIDEO} what?", f"{IMAGE}"], ids=repr
)
def test_adjacent_items_at_both_ends_of_a_prompt(served: Served, prompt: str) -> None:
    if served.version == "2.5" and ROUNDS and VIDEO in prompt:
        pytest.skip(NO_REFERENCE)
    item = with_metadata(CLIP) if served.version == "2.5" else CLIP
    images, videos = [PICTURE] * prompt.count(IMAGE), [CLIP] * prompt.count(VIDEO)
    data = {"image": images} if images else {}
    data |= {"video": [item]} if videos else {}
    served.engine.clear_caches()
    (output,) = served.run(
        {
            "prompt": prompt,
            "multi_modal_data": data,
            "mm_processor_kwargs": {"visual_budget": 8},
        }
    )
    kept = served.kept(len(images) + len(videos))
    ids = token_ids(output)
    assert ids == served.reference.answer(prompt, kept, images, videos, len(ids))


def test_closed_and_kept_positions_in_one_batch(served: Served) -> None:
    requests = []
    for question in QUESTIONS:
        for positions in ("kept", "closed"):
            for item in ({"images": [PICTURE]}, {"videos": [CLIP]}):
                each = served.request(question, 12, **item)
                each["mm_processor_kwargs"]["visual_positions"] = positions
                requests.append(each)
    alone = []
    for each in requests:
        served.engine.clear_caches()
        alone.append(token_ids(served.run(each)[0]))
    served.engine.clear_caches()
    for _ in range(2):  # the second time from the caches
        assert [token_ids(each) for each in served.run(*requests)] == alone
    assert alone[0] != alone[2]


@pytest.mark.parametrize("selector", ["visionzip", "prumerge+"])
def test_merged_tokens_have_positions(served: Served, selector: str) -> None:
    requests = [
        served.request(QUESTIONS[0], budget, images, videos)
        for budget in (5, 12)
        for images, videos in (([PICTURE], []), ([], [CLIP]))
    ]
    for each in requests:
        each["mm_processor_kwargs"]["visual_selector"] = selector
    (stock,) = served.run(served.request(QUESTIONS[0], None, [PICTURE]))
    alone = []
    for each in requests:
        served.engine.clear_caches()
        alone.append(served.run(each)[0])
    assert len(stock.prompt_token_ids) - len(alone[0].prompt_token_ids) == 49 - 5
    served.engine.clear_caches()
    together = served.run(*requests)
    assert [token_ids(each) for each in together] == [token_ids(each) for each in alone]


def test_a_budget_below_one_token_per_time_step_is_refused_and_the_engine_continues(
    served: Served,
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="the smallest budget for it is 4"):
        served.run(served.request(QUESTIONS[0], 3, videos=[CLIP]))
    assert token_ids(served.run(served.request(QUESTIONS[0], 4, videos=[CLIP]))[0])


@pytest.mark.skipif(ROUNDS, reason=NO_REFERENCE)
def test_vllms_own_video_pruning_still_applies_without_a_budget(start_engine: StartEngine) -> None:
    """With --video-pruning-rate, vLLM prunes videos without a budget, not those with one."""
    from vllm.multimodal.video_prune.evs import compute_retention_mask

    path = build_qwen_vl(REPOSITORY / ".models" / "qwen2.5-vl", "2.5")
    reference = Reference(path)
    inputs = reference.processor.video_processor(
        [CLIP], do_sample_frames=False, return_tensors="pt"
    )
    grid = inputs["video_grid_thw"]
    with torch.inference_mode():
        (rows,) = reference.model.model.get_video_features(
            inputs["pixel_values_videos"], grid
        ).pooler_output
    mask = compute_retention_mask(rows, tuple(grid[0].tolist()), spatial_merge_size=2, q=0.5)
    by_vllm = mask.nonzero().flatten().tolist()
    with start_engine(path, video_pruning_rate=0.5, max_num_batched_tokens=64) as engine:
        served = Served(engine, reference, "2.5")
        for budget in (None, 10):
            engine.clear_caches()
            requests = [
                served.request(QUESTIONS[0], budget, videos=[CLIP]),
                served.request(QUESTIONS[0], None, [PICTURE], [CLIP]),
            ]
            alone, mixed = served.run(*requests)
            kept = [by_vllm] if budget is None else served.kept(1)
            prompt = text(QUESTIONS[0], 0, 1)
            assert token_ids(alone) == reference.answer(prompt, kept, [], [CLIP], 8), budget
            prompt = text(QUESTIONS[0], 1, 1)
            kept = [list(range(49)), by_vllm]
            assert token_ids(mixed) == reference.answer(prompt, kept, [PICTURE], [CLIP], 8), budget


def test_many_images_of_one_token_stay_inside_the_rotary_table(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has 512 positions. Without pruning these would need 550, 20 per image."""
    # In this process, so that positions can be read: a CPU does not fail beyond the table.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    seen: list[int] = []
    forward = PositionedModel.forward

    def watched(model: Any, **given: Any) -> Any:
        seen.append(int(given["positions"].max()))
        return forward(model, **given)

    monkeypatch.setattr(PositionedModel, "forward", watched)
    path = build_qwen_vl(REPOSITORY / ".models" / "qwen2.5-vl", "2.5")
    image = photo("astronaut").resize((20 * 28, 2 * 28))
    with start_engine(
        path,
        max_model_len=128,
        hf_overrides={"text_config": {"max_position_embeddings": 128}},
        limit_mm_per_prompt={"image": 24},
    ) as engine:
        served = Served(engine, Reference(path), "2.5")
        seen.clear()
        served.run(served.request(QUESTIONS[0], 1, [image] * 12))
        assert 12 * 20 < max(seen) < 400
        (answer,) = served.run(served.request(QUESTIONS[0], 1, [image] * 24))
        assert len(token_ids(answer)) == 8
        assert 400 < max(seen) < 512
