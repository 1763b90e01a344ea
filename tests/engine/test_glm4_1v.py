# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V: images and videos with budgets against Transformers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from flashvlm_vllm.selection import fused_scores
from testing.photo import photo
from testing.tiny.glm4_1v import IMAGE, VIDEO, build_glm4_1v
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.test_qwen_vl import Reference, received, with_metadata

QUESTIONS = ("what color is the suit?", "where is the flag?")
PICTURE = photo("astronaut").resize((200, 190))
TALL = photo("cat").resize((40, 300))
CLIP = np.stack([np.array(photo(name).resize((120, 100))) for name in ("cat", "coffee") * 2])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(build_glm4_1v(REPOSITORY / ".models" / "glm4.1v"))


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Iterator[Engine]:
    # A chunk is shorter than most prompts here, so they are prefilled in several chunks.
    with start_engine(
        build_glm4_1v(REPOSITORY / ".models" / "glm4.1v"),
        max_num_batched_tokens=64,
        block_size=32,
        limit_mm_per_prompt={"image": 3, "video": 1},
    ) as engine:
        yield engine


def text(question: str, images: int, videos: int = 0) -> str:
    marks = IMAGE * images + VIDEO * videos
    return f"[gMASK]<sop><|system|>\nYou are careful.<|user|>\n{marks}{question}<|assistant|>\n"


def request(
    question: str, budget: object, images: Sequence[Any] = (PICTURE,), videos: int = 0
) -> dict[str, Any]:
    data: dict[str, Any] = {"image": list(images)} if images else {}
    data |= {"video": [with_metadata(CLIP)]} if videos else {}
    return {
        "prompt": text(question, len(images), videos),
        "multi_modal_data": data,
        **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
    }


def run(engine: Engine, *requests: dict[str, Any], tokens: int = 8) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    return list(engine.llm.generate(list(requests), sampling, use_tqdm=False))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "budget"),
    [
        ([PICTURE], None),
        ([PICTURE], 4),
        ([PICTURE, TALL], None),
        ([PICTURE, TALL], 10),
        ([PICTURE, TALL], 0.3),
    ],
)
def test_answers_equal_transformers_with_the_same_tokens_at_the_same_positions(
    engine: Engine, reference: Reference, images: list[Any], budget: object
) -> None:
    engine.clear_caches()
    (output,) = run(engine, request(QUESTIONS[0], budget, images))
    grids = reference.processor.image_processor(images, return_tensors="pt")["image_grid_thw"]
    lengths = [int(grid.prod()) // 4 for grid in grids]
    kept = [list(range(length)) for length in lengths]
    if budget is not None:
        kept = [each["kept"] for each in engine.kept()[-len(images) :]]
        counts = [
            budget if isinstance(budget, int) else math.floor(length * 0.3 + 0.5)
            for length in lengths
        ]
        assert [len(each) for each in kept] == counts
    gone = sum(lengths) - sum(map(len, kept))
    prompt = text(QUESTIONS[0], len(images))
    whole = reference.processor(text=[prompt], images=images)["input_ids"][0]
    assert len(output.prompt_token_ids) == len(whole) - gone
    ids = token_ids(output)
    assert ids == reference.answer(prompt, kept, images, [], len(ids))


def test_the_important_half_equals_that_from_transformers_attention(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.clear_caches()
    run(engine, request(QUESTIONS[0], 20), tokens=1)
    record = engine.kept()[-1]
    inputs = reference.processor.image_processor([PICTURE], return_tensors="pt")
    grid = inputs["image_grid_thw"]
    saliency = received(reference.model, inputs["pixel_values"], grid, monkeypatch)
    with torch.inference_mode():
        features = reference.model.model.get_image_features(inputs["pixel_values"], grid)
        words = reference.model.get_input_embeddings()(torch.tensor(record["query"]))
        scores = fused_scores(features.pooler_output[0], saliency, words)
    assert set(scores.topk(10).indices.tolist()) <= set(record["kept"])
    tokenizer = reference.processor.tokenizer
    assert record["query"] == tokenizer(QUESTIONS[0], add_special_tokens=False).input_ids


def test_requests_in_a_mixed_batch_answer_as_alone(engine: Engine) -> None:
    requests = [
        request(question, budget, images, videos)
        for question in QUESTIONS
        for budget, images, videos in (
            (None, [PICTURE], 0),
            (9, [PICTURE], 0),
            (12, [PICTURE, TALL], 0),
            (None, [PICTURE], 1),
            (6, [PICTURE], 1),
        )
    ]
    alone = []
    for each in requests:
        engine.clear_caches()
        alone.append(token_ids(run(engine, each)[0]))
    engine.clear_caches()
    for _ in range(2):  # the second time from the caches
        outputs = run(engine, *requests)
        assert [token_ids(each) for each in outputs] == alone
    assert any(each.num_cached_tokens >= 32 for each in outputs)
    assert alone[1] != alone[6]


def test_a_budget_of_all_tokens_equals_no_budget(engine: Engine) -> None:
    engine.clear_caches()
    stock, whole = (run(engine, request(QUESTIONS[0], budget))[0] for budget in (None, 4096))
    assert token_ids(stock) == token_ids(whole)
    assert whole.num_cached_tokens >= 32
    (other,) = run(engine, request(QUESTIONS[0], None, [photo("cat").resize(PICTURE.size)]))
    assert token_ids(other) != token_ids(stock)


@pytest.mark.parametrize("budget", [None, 2, 7, 0.5])
def test_a_video_and_an_image_are_answered_as_by_transformers(
    engine: Engine, reference: Reference, budget: object
) -> None:
    engine.clear_caches()
    (output,) = run(engine, request(QUESTIONS[0], budget, [PICTURE], 1))
    lengths = [49, video_tokens(reference)]
    kept = [list(range(length)) for length in lengths]
    if budget is not None:
        kept = [each["kept"] for each in engine.kept()[-2:]]
        half = isinstance(budget, float)
        counts = [math.floor(length * 0.5 + 0.5) if half else budget for length in lengths]
        assert [len(each) for each in kept] == counts
        # Both time steps keep a token.
        assert {place // (lengths[1] // 2) for place in kept[1]} == {0, 1}
    ids = token_ids(output)
    prompt = text(QUESTIONS[0], 1, 1)
    assert ids == reference.answer(prompt, kept, [PICTURE], [CLIP], len(ids))
    visual = [reference.model.config.image_token_id] * sum(map(len, kept))
    assert [each for each in output.prompt_token_ids if each in visual] == visual


def test_a_video_that_the_processor_samples_is_counted_after_it_was_sampled(
    engine: Engine, reference: Reference
) -> None:
    video, metadata = with_metadata(np.repeat(CLIP, 4, axis=0))
    metadata |= {"fps": 8.0, "duration": 2.0, "do_sample_frames": True}
    sampled = dict(request(QUESTIONS[0], None, [], 1))
    sampled["multi_modal_data"] = {"video": [(video, metadata)]}
    image = reference.model.config.image_token_id
    stock, pruned, whole = (
        run(engine, {**sampled, "mm_processor_kwargs": {"visual_budget": budget}})[0]
        for budget in (None, 0.5, 4096)
    )
    # Of 16 frames in two seconds four are sampled.
    total = list(stock.prompt_token_ids).count(image)
    assert total == video_tokens(reference)
    assert list(pruned.prompt_token_ids).count(image) == total // 2
    assert token_ids(whole) == token_ids(stock)


def test_selectors_that_merge_tokens_keep_the_exact_count_of_a_video(
    engine: Engine, reference: Reference
) -> None:
    engine.clear_caches()
    merging = request(QUESTIONS[0], 8, [PICTURE], 1)
    merging["mm_processor_kwargs"]["visual_selector"] = "visionzip"
    (output,) = run(engine, merging)
    image = reference.model.config.image_token_id
    assert list(output.prompt_token_ids).count(image) == 8 + 8
    (again,) = run(engine, merging)
    assert token_ids(again) == token_ids(output)


def video_tokens(reference: Reference) -> int:
    """Return the number of visual tokens of ``CLIP``."""
    grid = reference.processor.video_processor([CLIP], do_sample_frames=False, return_tensors="pt")[
        "video_grid_thw"
    ]
    return int(grid.prod()) // 4


@pytest.mark.slow
def test_a_default_budget_prunes_images_and_videos(
    start_engine: StartEngine, engine: Engine
) -> None:
    requests = [request(QUESTIONS[0], 8, [PICTURE], videos) for videos in (0, 1)]
    expected = [token_ids(each) for each in run(engine, *requests)]
    for each in requests:
        del each["mm_processor_kwargs"]
    with start_engine(
        build_glm4_1v(REPOSITORY / ".models" / "glm4.1v"),
        mm_processor_kwargs={"visual_budget": 8},
        limit_mm_per_prompt={"image": 1, "video": 1},
    ) as other:
        assert [token_ids(each) for each in run(other, *requests)] == expected
        assert [len(each["kept"]) for each in other.kept()] == [8, 8]
