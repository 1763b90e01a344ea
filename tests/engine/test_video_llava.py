# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA, which only this plugin serves: equal to Transformers, with and without pruning."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from testing.photo import photo
from testing.tiny.video_llava import FRAME_TOKENS, FRAMES, PATCHES, build_video_llava
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids
from tests.engine.reference import greedy, positions_of

QUESTIONS = ("what color is the suit?", "where is the flag?")
NAMES = ["astronaut", "astronaut", "cat", "coffee", "cat", "rocket", "astronaut", "coffee"]
VIDEO = np.stack([np.array(photo(name).resize((130, 120))) for name in NAMES])
WHOLE = FRAMES * FRAME_TOKENS
BUDGETS = (455, 227, 114)  # the budgets of the paper, for 8 x 256 patches
STEPS = 8

Item = Image.Image | np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def model() -> Path:
    return build_video_llava(REPOSITORY / ".models" / "video-llava")


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, model: Path) -> Iterator[Engine]:
    # A chunk is shorter than a whole video.
    with start_engine(model, max_num_batched_tokens=1024, block_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def processor(model: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)


def text_of(question: str, items: Sequence[Item]) -> str:
    names = ["<image>" if isinstance(item, Image.Image) else "<video>" for item in items]
    return f"USER: {''.join(names)}\n{question} ASSISTANT:"


def prompt_of(
    question: str, budget: object = None, items: Sequence[Item] = (VIDEO,), **own: Any
) -> Any:
    images = [item for item in items if isinstance(item, Image.Image)]
    videos = [item for item in items if not isinstance(item, Image.Image)]
    data = {name: each for name, each in (("image", images), ("video", videos)) if each}
    own |= {} if budget is None else {"visual_budget": budget}
    return {
        "prompt": text_of(question, items),
        "multi_modal_data": data,
        **({"mm_processor_kwargs": own} if own else {}),
    }


def ask(engine: Engine, *prompts: Any, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=STEPS, **sampling)
    return list(engine.llm.generate(list(prompts), settings, use_tqdm=False))


@pytest.mark.parametrize(
    "items",
    [[VIDEO], [photo("astronaut")], [photo("cat"), VIDEO[:3], photo("coffee")]],
    ids=["video", "image", "images and 3 frames"],
)
def test_without_a_budget_answers_equal_transformers(
    engine: Engine, reference: Any, processor: Any, items: list[Item]
) -> None:
    engine.clear_caches()
    (output,) = ask(engine, prompt_of(QUESTIONS[0], items=items), logprobs=1)
    prompt = prompt_of(QUESTIONS[0], items=items)
    data = prompt["multi_modal_data"]
    inputs = processor(
        text=prompt["prompt"],
        images=data.get("image"),
        videos=[list(each) for each in data["video"]] if "video" in data else None,
        return_tensors="pt",
    )
    with torch.inference_mode():
        out = reference.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert token_ids(output) == out.sequences[0].tolist()[-STEPS:]
    for step, logits in zip(output.outputs[0].logprobs, out.logits, strict=True):
        best = max(step.values(), key=lambda each: each.logprob)
        expected = logits[0].log_softmax(-1).max().item()
        assert best.logprob == pytest.approx(expected, abs=1e-3)


def test_answers_depend_on_the_image_or_video(engine: Engine) -> None:
    outputs = ask(
        engine,
        *(prompt_of(QUESTIONS[0], items=[item]) for item in (VIDEO, VIDEO[::-1].copy())),
        *(prompt_of(QUESTIONS[0], items=[photo(name)]) for name in ("astronaut", "coffee")),
    )
    assert len({tuple(token_ids(output)) for output in outputs}) == len(outputs)


@pytest.mark.parametrize("budget", BUDGETS)
def test_answers_equal_transformers_given_the_kept_tokens(
    engine: Engine, reference: Any, processor: Any, budget: int
) -> None:
    pixels = processor.video_processor([VIDEO], return_tensors="pt")["pixel_values_videos"]
    with torch.inference_mode():
        rows = reference.model.get_video_features(pixels).pooler_output[:, 1:].flatten(0, 1)
    engine.clear_caches()
    (output,) = ask(engine, prompt_of(QUESTIONS[0], budget))
    kept = torch.tensor(engine.kept()[-1]["kept"])
    assert len(kept) == budget
    assert (kept.diff() > 0).all()
    assert (kept // PATCHES).unique().tolist() == list(range(FRAMES))

    embed, tokenize = reference.get_input_embeddings(), processor.tokenizer
    head, tail = text_of(QUESTIONS[0], [VIDEO]).split("<video>")
    ids = [tokenize(head).input_ids, tokenize(tail, add_special_tokens=False).input_ids]
    assert len(output.prompt_token_ids) == sum(map(len, ids)) + budget
    with torch.inference_mode():
        before, after = (embed(torch.tensor(each)) for each in ids)
        inputs = torch.cat([before, rows[kept], after])
    # Each frame's patches follow its class token.
    places = kept + kept // PATCHES + 1
    positions = positions_of(len(ids[0]), places, FRAMES * (PATCHES + 1), len(ids[1]))
    assert token_ids(output) == greedy(reference, inputs, positions, STEPS)


def test_requests_in_a_mixed_batch_and_from_caches_answer_as_alone(engine: Engine) -> None:
    mixed: list[Item] = [photo("cat"), VIDEO]
    prompts = [
        prompt_of(QUESTIONS[0]),
        *(prompt_of(question, budget) for question in QUESTIONS for budget in (8, 455, 0.25)),
        prompt_of(QUESTIONS[1], 200, mixed),
        prompt_of(QUESTIONS[1], 256, mixed),
        prompt_of(QUESTIONS[1], None, mixed),
        # A video that is kept whole, with its class tokens, next to one that is pruned.
        prompt_of(QUESTIONS[1], 600, [VIDEO, VIDEO[:2]]),
    ]
    alone = []
    for prompt in prompts:
        engine.clear_caches()
        alone.append(token_ids(ask(engine, prompt)[0]))
    engine.clear_caches()
    together = ask(engine, *prompts)
    assert [token_ids(output) for output in together] == alone
    lengths = [len(output.prompt_token_ids) for output in together]
    assert [lengths[0] - length for length in lengths[1:4]] == [
        WHOLE - 8,
        WHOLE - 455,
        WHOLE - WHOLE // 4,
    ]
    whole = PATCHES + WHOLE
    assert [lengths[9] - length for length in lengths[7:9]] == [whole - 400, whole - 512]
    assert lengths[9] - lengths[10] == whole - 600 - 2 * FRAME_TOKENS
    assert [token_ids(output) for output in ask(engine, *prompts)] == alone
    engine.clear_caches()
    first, same, other = (
        ask(engine, prompt_of(question, 64))[0] for question in (QUESTIONS[0], *QUESTIONS)
    )
    assert same.num_cached_tokens >= 64
    assert token_ids(first) == token_ids(same)
    assert not other.num_cached_tokens


def test_budgets_near_the_number_of_patches_drop_the_class_tokens(engine: Engine) -> None:
    """A budget of all tokens equals stock; below it, the class tokens are dropped first."""
    engine.clear_caches()
    stock, whole = (ask(engine, prompt_of(QUESTIONS[0], budget))[0] for budget in (None, WHOLE))
    assert whole.num_cached_tokens >= 64
    assert token_ids(whole) == token_ids(stock)
    (patches,) = ask(engine, prompt_of(QUESTIONS[0], WHOLE - 1))
    assert engine.kept()[-1]["kept"] == list(range(FRAMES * PATCHES))
    assert len(stock.prompt_token_ids) - len(patches.prompt_token_ids) == FRAMES


def test_a_budget_below_one_token_per_frame_is_refused(engine: Engine) -> None:
    with pytest.raises(Exception, match="smallest budget for it is 8"):
        ask(engine, prompt_of(QUESTIONS[0], FRAMES - 1))


@pytest.mark.parametrize("name", ["visionzip", "prumerge+"])
def test_merging_selectors_keep_the_exact_count(engine: Engine, name: str) -> None:
    engine.clear_caches()
    (merged,) = ask(engine, prompt_of(QUESTIONS[0], 114, visual_selector=name))
    assert engine.kept()[-1]["kept"] is None
    (plain,) = ask(engine, prompt_of(QUESTIONS[0], 114))
    assert len(merged.prompt_token_ids) == len(plain.prompt_token_ids)
