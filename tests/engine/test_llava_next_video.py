# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: counts, mixed budgets, caches, and parity with Transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d

from testing.photo import photo
from testing.tiny.next_video import FRAME_TOKENS, SIDE, build_next_video
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import greedy, positions_of

QUESTIONS = ("what color is the suit?", "where is the flag?")
NAMES = ["astronaut", "astronaut", "cat", "coffee", "cat"]
VIDEO = np.stack([np.array(photo(name).resize((130, 120))) for name in NAMES])
WHOLE = len(NAMES) * FRAME_TOKENS


@pytest.fixture(scope="module")
def model() -> Path:
    return build_next_video(REPOSITORY / ".models" / "next-video")


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, model: Path) -> Iterator[Engine]:
    # A chunk is shorter than the whole video.
    with start_engine(model, max_num_batched_tokens=64, block_size=32) as engine:
        yield engine


def ask(
    engine: Engine, *requests: tuple[str, object], video: NDArray[np.uint8] = VIDEO
) -> list[Any]:
    from vllm import SamplingParams

    prompts = [
        {
            "prompt": f"USER: <video>\n{question} ASSISTANT:",
            "multi_modal_data": {"video": video},
            **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
        }
        for question, budget in requests
    ]
    sampling = SamplingParams(temperature=0, max_tokens=8)
    return list(engine.llm.generate(prompts, sampling, use_tqdm=False))  # type: ignore[arg-type]


def test_answers_equal_transformers_given_the_kept_tokens(engine: Engine, model: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    reference: Any = AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(model)
    embed, tokenize = reference.get_input_embeddings(), processor.tokenizer
    head = torch.tensor(tokenize("USER: ").input_ids)
    for frames in (1, 5):
        video = VIDEO[:frames]
        pixels = processor.video_processor([video], return_tensors="pt")["pixel_values_videos"]
        with torch.inference_mode():
            rows = torch.cat(list(reference.model.get_video_features(pixels).pooler_output))
        rows = rows.reshape(-1, rows.shape[-1])
        assert len(rows) == frames * FRAME_TOKENS
        for budget in (None, frames, 3 * frames + 1):
            engine.clear_caches()
            (output,) = ask(engine, (QUESTIONS[0], budget), video=video)
            kept = torch.arange(len(rows))
            if budget is not None:
                kept = torch.tensor(engine.kept()[-1]["kept"])
                assert (kept // FRAME_TOKENS).unique().tolist() == list(range(frames))
                assert len(kept) == budget
            after = f"\n{QUESTIONS[0]} ASSISTANT:"
            tail = torch.tensor(tokenize(after, add_special_tokens=False).input_ids)
            with torch.inference_mode():
                inputs = torch.cat([embed(head), rows[kept], embed(tail)])
            positions = positions_of(len(head), kept, len(rows), len(tail))
            assert token_ids(output) == greedy(reference, inputs, positions, 8), (frames, budget)


def test_requests_in_a_mixed_batch_and_from_caches_answer_as_alone(engine: Engine) -> None:
    requests = [(question, budget) for question in QUESTIONS for budget in (None, 7, 40, 0.5)]
    alone = []
    for each in requests:
        engine.clear_caches()
        alone.append(token_ids(ask(engine, each)[0]))
    engine.clear_caches()
    together = ask(engine, *requests)
    assert [token_ids(output) for output in together] == alone
    lengths = [len(output.prompt_token_ids) for output in together[:4]]
    assert [lengths[0] - length for length in lengths] == [0, WHOLE - 7, WHOLE - 40, WHOLE // 2]
    assert [token_ids(output) for output in ask(engine, *requests)] == alone
    engine.clear_caches()
    first, same, other = (ask(engine, (q, 64))[0] for q in (QUESTIONS[0], *QUESTIONS))
    assert same.num_cached_tokens >= 64
    assert token_ids(first) == token_ids(same)
    assert not other.num_cached_tokens


def test_a_budget_of_all_tokens_equals_stock(engine: Engine) -> None:
    engine.clear_caches()
    stock, whole = (ask(engine, (QUESTIONS[0], budget))[0] for budget in (None, WHOLE))
    assert whole.num_cached_tokens >= 64
    assert token_ids(whole) == token_ids(stock)
    before = len(engine.kept())
    ask(engine, ("anything else?", WHOLE + 1))
    assert len(engine.kept()) == before


def test_a_budget_of_one_token_per_frame_keeps_the_most_attended_ones(
    engine: Engine, model: Path
) -> None:
    """Attention from Transformers, averaged over the patches of a token."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    reference: Any = AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(model).video_processor
    pixels = processor([VIDEO], return_tensors="pt")["pixel_values_videos"][0]
    with torch.inference_mode():
        attentions = reference.model.vision_tower(pixels, output_attentions=True).attentions
        layer = attentions[reference.config.vision_feature_layer]
    received = layer.mean(dim=1)[:, 0, 1:].view(-1, SIDE, SIDE)
    pooled = avg_pool2d(received, 2).flatten(1)
    floor = pooled.argmax(dim=1) + torch.arange(len(NAMES)) * FRAME_TOKENS
    engine.clear_caches()
    ask(engine, (QUESTIONS[0], len(NAMES)))
    assert engine.kept()[-1]["kept"] == floor.tolist()


def test_long_videos_are_pruned_and_unsupported_inputs_are_refused(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    long = np.repeat(VIDEO[:1], 200, axis=0)
    (explicit,) = ask(engine, (QUESTIONS[0], 200), video=long)
    assert len(engine.kept()[-1]["kept"]) == 200
    (fraction,) = ask(engine, (QUESTIONS[0], 0.001), video=long)
    assert token_ids(fraction) == token_ids(explicit)
    assert len(fraction.prompt_token_ids) == len(explicit.prompt_token_ids)
    with pytest.raises(VLLMValidationError, match="the smallest budget for it is 200"):
        ask(engine, (QUESTIONS[0], 199), video=long)
    for modality, items in (("video", [VIDEO, VIDEO[:2]]), ("image", [photo("cat")])):
        prompt = {
            "prompt": f"USER: {'<video>' * len(items)}\nwhat is it? ASSISTANT:",
            "multi_modal_data": {modality: items},
            "mm_processor_kwargs": {"visual_budget": 20},
        }
        with pytest.raises(VLLMValidationError, match=f"At most . {modality}"):
            engine.llm.generate(prompt, use_tqdm=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["visionzip", "prumerge+"])
def test_merging_selectors_keep_the_exact_count(engine: Engine, name: str) -> None:
    from vllm import SamplingParams

    engine.clear_caches()
    (output,) = engine.llm.generate(
        {
            "prompt": "USER: <video>\nwhat is it? ASSISTANT:",
            "multi_modal_data": {"video": VIDEO},
            "mm_processor_kwargs": {"visual_budget": 23, "visual_selector": name},
        },  # type: ignore[arg-type]
        SamplingParams(temperature=0, max_tokens=4),
        use_tqdm=False,
    )
    assert engine.kept()[-1]["kept"] is None
    (plain,) = ask(engine, ("what is it?", 23))
    assert len(output.prompt_token_ids) == len(plain.prompt_token_ids)
