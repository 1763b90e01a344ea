# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5: the prompts and positions of Qwen3-VL with linear attention.

vLLM's linear attention on CPU supports bfloat16 only, so answers are compared with Transformers
in the same dtype, for the first four tokens: later ones depend on rounding.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from testing.tiny.qwen3_5 import build_qwen3_5
from tests.engine.conftest import REPOSITORY, StartEngine, token_ids
from tests.engine.test_qwen3_vl import (
    CLIP,
    OTHER,
    PICTURE,
    QUESTIONS,
    Reference,
    Served,
    Video,
    request,
    text,
)


@pytest.fixture(scope="module")
def served(start_engine: StartEngine) -> Iterator[Served]:
    path = build_qwen3_5(REPOSITORY / ".models" / "qwen3.5")
    with start_engine(
        path,
        dtype="bfloat16",
        max_num_batched_tokens=128,
        limit_mm_per_prompt={"image": 3, "video": 2},
    ) as engine:
        reference = Reference(path)
        reference.model.to(torch.bfloat16)
        yield Served(engine, reference)


@pytest.mark.parametrize(
    ("images", "videos", "lengths"),
    [([PICTURE], [], [36]), ([PICTURE], [OTHER, CLIP], [36, 40, 80])],
    ids=["image", "image and videos"],
)
def test_answers_equal_transformers_with_the_same_tokens_at_the_same_positions(
    served: Served, images: list[Any], videos: list[Video], lengths: list[int]
) -> None:
    answers = []
    for budget in (None, 4, 23):
        served.engine.clear_caches()
        (output,) = served.run(request(QUESTIONS[0], budget, images, videos))
        kept = None
        if budget is not None:
            kept = [each["kept"] for each in served.engine.kept()[-len(lengths) :]]
            assert [len(each) for each in kept] == [min(budget, length) for length in lengths]
        answers.append(token_ids(output))
        prompt = text(QUESTIONS[0], len(images), len(videos))
        expected = served.reference.answer(prompt, kept, images, videos, 8)
        assert answers[-1][:4] == expected[:4], budget
    assert answers[0] != answers[1]


def test_a_budget_of_all_tokens_changes_nothing_and_text_is_unchanged(served: Served) -> None:
    served.engine.clear_caches()
    stock, whole, least = (
        served.run(request(QUESTIONS[0], budget, videos=[CLIP]))[0] for budget in (None, 80, 4)
    )
    assert token_ids(stock) == token_ids(whole)
    video = served.reference.model.config.video_token_id
    words = [
        [token for token in output.prompt_token_ids if token != video] for output in (stock, least)
    ]
    assert words[0] == words[1]
    assert len(least.prompt_token_ids) == len(words[0]) + 4
    assert [place // 20 for place in served.engine.kept()[-1]["kept"]] == [0, 1, 2, 3]


def test_requests_in_a_mixed_batch_keep_the_same_tokens_as_alone(served: Served) -> None:
    budgets = (None, 9, 12, 0.5)
    requests = [
        request(question, budget, [PICTURE]) for question in QUESTIONS for budget in budgets
    ]
    prompts, kept = [], []
    for each in requests:
        served.engine.clear_caches()
        prompts.append(served.run(each, tokens=1)[0].prompt_token_ids)
        if "mm_processor_kwargs" in each:
            kept.append(served.engine.kept()[-1]["kept"])
    served.engine.clear_caches()
    together = served.run(*requests)
    assert [each.prompt_token_ids for each in together] == prompts
    seen = [each["kept"] for each in served.engine.kept()[-len(kept) :]]
    assert sorted(seen) == sorted(kept)
