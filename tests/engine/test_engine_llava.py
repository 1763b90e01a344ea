# SPDX-License-Identifier: Apache-2.0
"""One engine, LLaVA-1.5 with a CLIP tower: counts, mixed batches, cache identity, conversations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashvlm_vllm.request.budget import kept_tokens
from flashvlm_vllm.request.refusal import Refusal
from testing.photo import photo
from tests.engine.conftest import Engine, StartEngine, token_ids

QUESTIONS = ("what color is the suit?", "where is the flag?")


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, clip_llava: Path) -> Iterator[Engine]:
    with start_engine(clip_llava) as engine:
        yield engine


@pytest.fixture(scope="module")
def image_token(clip_llava: Path) -> int:
    return int(json.loads((clip_llava / "config.json").read_text())["image_token_index"])


@pytest.mark.parametrize("budget", [1, 2, 7, 32, 64, 575, 0.001, 0.25, 0.5])
def test_the_number_of_placeholders_equals_the_kept_embeddings(
    engine: Engine, image_token: int, budget: float
) -> None:
    engine.clear_caches()
    before = len(engine.kept())
    output = engine.ask(QUESTIONS[0], budget)
    (record,) = engine.kept()[before:]
    expected = kept_tokens(576, budget)
    assert list(output.prompt_token_ids).count(image_token) == expected
    assert len(record["kept"]) == len(set(record["kept"])) == expected
    assert record["kept"] == sorted(record["kept"])


def test_the_prompt_is_shorter_by_the_dropped_tokens(engine: Engine) -> None:
    lengths = [len(engine.ask(QUESTIONS[0], b).prompt_token_ids) for b in (None, 64, 32)]
    assert [lengths[0] - length for length in lengths] == [0, 512, 544]


def test_requests_in_a_mixed_batch_answer_as_alone(engine: Engine) -> None:
    requests = [
        (f"{question} {number}", budget)
        for number in range(3)
        for question in QUESTIONS
        for budget in (None, 16, 64, 0.25)
    ]
    engine.clear_caches()
    alone = []
    for request in requests:
        engine.clear_caches()
        alone.append(engine.ask(*request))
    engine.clear_caches()
    together = engine.ask_all(requests)
    for request, one, other in zip(requests, alone, together, strict=True):
        assert len(one.prompt_token_ids) == len(other.prompt_token_ids), request
        assert token_ids(one) == token_ids(other), request


def test_the_kept_tokens_depend_on_the_question(engine: Engine) -> None:
    engine.clear_caches()
    before = len(engine.kept())
    for question in QUESTIONS:
        engine.ask(question, 64)
    first, second = (set(record["kept"]) for record in engine.kept()[before:])
    assert first != second


def test_two_questions_about_one_image_answer_as_without_caches(engine: Engine) -> None:
    cold = {}
    for question in QUESTIONS:
        engine.clear_caches()
        cold[question] = token_ids(engine.ask(question, 64))
    engine.clear_caches()
    for question in (*QUESTIONS, *QUESTIONS):
        assert token_ids(engine.ask(question, 64)) == cold[question]
    assert len({tuple(ids) for ids in cold.values()}) == len(QUESTIONS)


def test_the_same_question_again_hits_the_prefix_cache(engine: Engine) -> None:
    engine.clear_caches()
    assert not engine.ask(QUESTIONS[0], 256).num_cached_tokens
    assert engine.ask(QUESTIONS[0], 256).num_cached_tokens >= 256
    # Another question keeps other tokens, so it must share no block of the image.
    assert not engine.ask(QUESTIONS[1], 256).num_cached_tokens


def test_another_budget_does_not_hit_the_prefix_cache(engine: Engine) -> None:
    engine.clear_caches()
    engine.ask(QUESTIONS[0], 256)
    assert not engine.ask(QUESTIONS[0], 255).num_cached_tokens


def test_a_budget_of_all_tokens_shares_the_cache_with_no_budget(engine: Engine) -> None:
    engine.clear_caches()
    plain = engine.ask(QUESTIONS[0], None, logprobs=3)
    whole = engine.ask(QUESTIONS[0], 576, logprobs=3)
    assert whole.num_cached_tokens >= 512
    assert token_ids(whole) == token_ids(plain)


def test_the_budget_applies_to_each_of_several_images(engine: Engine, image_token: int) -> None:
    images = [photo("astronaut"), photo("cat"), photo("coffee")]
    engine.clear_caches()
    before = len(engine.kept())
    output = engine.ask(QUESTIONS[0], 20, images)
    assert list(output.prompt_token_ids).count(image_token) == 60
    assert [len(record["kept"]) for record in engine.kept()[before:]] == [20, 20, 20]


def test_the_same_question_in_chat_and_in_a_prompt_selects_the_same_tokens(engine: Engine) -> None:
    from vllm import SamplingParams

    engine.clear_caches()
    engine.ask(QUESTIONS[1], 64)
    before = len(engine.kept())
    content = [
        {"type": "image_pil", "image_pil": photo("astronaut")},
        {"type": "text", "text": QUESTIONS[1]},
    ]
    engine.llm.chat(
        [{"role": "user", "content": content}],  # type: ignore[list-item]
        SamplingParams(temperature=0, max_tokens=2),
        use_tqdm=False,
        mm_processor_kwargs={"visual_budget": 64},
    )
    # The encoder cache has the item: same image, same budget, same question.
    assert len(engine.kept()) == before


def test_content_parts_of_a_chat_have_settings_of_their_own(engine: Engine) -> None:
    from vllm import SamplingParams

    def chat(*own: dict[str, Any], **settings: Any) -> list[list[int]]:
        pictures = [
            {"type": "image_pil", "image_pil": photo(name), **fields}
            for name, fields in zip(("cat", "coffee"), own, strict=True)
        ]
        content = [*pictures, {"type": "text", "text": QUESTIONS[0]}]
        engine.clear_caches()
        before = len(engine.kept())
        engine.llm.chat(
            [{"role": "user", "content": content}],  # type: ignore[list-item]
            SamplingParams(temperature=0, max_tokens=2),
            use_tqdm=False,
            mm_processor_kwargs=settings or None,
        )
        return [record["kept"] for record in engine.kept()[before:]]

    (first, second) = chat({}, {}, visual_budget=64, visual_query="a cup")
    own = {"visual_budget": 64, "visual_query": "a cup"}
    assert chat(own, {"visual_budget": 8}, visual_query="an animal")[0] == first
    assert chat({"visual_budget": None}, own) == [second]  # vLLM encodes the first
    sizes = [len(each) for each in chat({"visual_budget": 8}, {}, visual_budget={"total": 90})]
    assert sizes == [8, 90]
    with pytest.raises(Refusal, match="visual_budget of image 1"):
        chat({}, {"visual_budget": 0})


def test_a_budget_that_fits_offline_leaves_a_quarter_of_the_context(engine: Engine) -> None:
    images = [photo("astronaut")] * 9
    output = engine.ask(QUESTIONS[0], "fit", images)
    assert 4096 * 3 // 4 - 9 < len(output.prompt_token_ids) <= 4096 * 3 // 4


def test_a_second_turn_answers_as_without_caches(engine: Engine) -> None:
    from vllm import SamplingParams

    image = {"type": "image_pil", "image_pil": photo("cat")}
    first = {"role": "user", "content": [image, {"type": "text", "text": "what is this?"}]}
    second = [
        first,
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "which colour are its eyes?"},
    ]

    def chat(messages: list[dict[str, object]]) -> list[int]:
        (output,) = engine.llm.chat(
            messages,  # type: ignore[arg-type]
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
            mm_processor_kwargs={"visual_budget": 64},
        )
        return token_ids(output)

    engine.clear_caches()
    cold = chat(second)
    engine.clear_caches()
    chat([first])
    before = len(engine.kept())
    assert chat(second) == cold
    # The latest user message is the question, so the second turn selects again.
    assert len(engine.kept()) == before + 1


def test_pictures_of_earlier_messages_keep_their_tokens_and_their_kv_blocks(
    engine: Engine,
) -> None:
    from vllm import SamplingParams

    names, words = ("cat", "coffee", "rocket"), ("which animal?", "which drink?", "where is it?")
    turns = []
    for name, text in zip(names, words, strict=True):
        image = {"type": "image_pil", "image_pil": photo(name)}
        turns.append({"role": "user", "content": [image, {"type": "text", "text": text}]})
        turns.append({"role": "assistant", "content": "I see."})

    def chat(messages: list[dict[str, object]], steering: str) -> Any:
        (output,) = engine.llm.chat(
            messages,  # type: ignore[arg-type]
            SamplingParams(temperature=0, max_tokens=4),
            use_tqdm=False,
            mm_processor_kwargs={"visual_budget": 64, "visual_steering": steering},
        )
        return output

    for steering, is_stable in (("message", True), ("latest", False)):
        engine.clear_caches()
        begun = len(engine.kept())
        # Each turn with one picture more, then a follow-up question about the last.
        outputs = [chat(turns[: 2 * number + 1], steering) for number in range(3)]
        records = engine.kept()[begun:]
        follow_up = [*turns[:5], {"role": "assistant", "content": "I see."}]
        follow_up.append({"role": "user", "content": "what colour is the sky?"})
        last = chat(follow_up, steering)
        again = len(engine.kept()) - begun - len(records)
        # The first block of KV cache ends behind the first picture.
        assert (outputs[2].num_cached_tokens > 0) is is_stable
        assert len(records) == (3 if is_stable else 6)
        # Only the picture of the newest message that has any is selected again.
        assert again == (1 if is_stable else 3)
        assert len(last.prompt_token_ids) < 3 * 64 + 100


def test_n_answers_share_one_selection(engine: Engine) -> None:
    engine.clear_caches()
    before = len(engine.kept())
    output = engine.ask(QUESTIONS[0], 64, n=3, temperature=1.0, seed=1)
    assert len(output.outputs) == 3
    assert len(engine.kept()) == before + 1


def test_visual_query_sets_the_question_and_without_words_saliency_decides(engine: Engine) -> None:
    from vllm import SamplingParams

    def kept_for(**arguments: object) -> dict[str, object]:
        engine.clear_caches()
        engine.llm.generate(
            {  # type: ignore[arg-type]
                "prompt": "USER: <image> ASSISTANT:",
                "multi_modal_data": {"image": photo("astronaut")},
                "mm_processor_kwargs": {"visual_budget": 64, **arguments},
            },
            SamplingParams(temperature=0, max_tokens=1),
            use_tqdm=False,
        )
        return engine.kept()[-1]

    no_query, empty, guided = kept_for(), kept_for(visual_query=""), kept_for(visual_query="flag")
    assert no_query["query"] == empty["query"] == []
    assert no_query["kept"] == empty["kept"]
    assert guided["query"]
    assert guided["kept"] != no_query["kept"]


def test_invalid_budgets_raise_and_the_engine_continues(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    for budget in (0, -1, 1.0, 1.5, "64", True, float("nan"), [64]):
        with pytest.raises(VLLMValidationError, match="visual budget"):
            engine.ask(QUESTIONS[0], budget)
    assert token_ids(engine.ask(QUESTIONS[0], 64))
