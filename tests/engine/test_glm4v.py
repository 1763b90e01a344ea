# SPDX-License-Identifier: Apache-2.0
"""GLM-4V: its tower against PyTorch, and answers against its language model given embeddings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from testing.photo import photo
from testing.tiny.glm4v import PLACEHOLDER, TOKENS, Reference, build_glm4v
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids

QUESTIONS = ("what color is the suit?", "where is the flag?")
STEPS = 8


@pytest.fixture(scope="module")
def model() -> Path:
    return build_glm4v(REPOSITORY / ".models" / "glm4v")


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, model: Path) -> Iterator[Engine]:
    # An image takes two chunks.
    with start_engine(model, max_num_batched_tokens=32, block_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def language_model(start_engine: StartEngine) -> Iterator[Engine]:
    """The same weights without a tower: vLLM's own model, which accepts embeddings."""
    model = build_glm4v(REPOSITORY / ".models" / "glm4v-text", with_vision=False)
    with start_engine(model, enable_prompt_embeds=True) as engine:
        yield engine


def prompt_of(question: str, budget: object = None, name: str = "astronaut", **own: Any) -> Any:
    own |= {} if budget is None else {"visual_budget": budget}
    return {
        "prompt": f"USER: {PLACEHOLDER}\n{question} ASSISTANT:",
        "multi_modal_data": {"image": photo(name)},
        **({"mm_processor_kwargs": own} if own else {}),
    }


def ask(engine: Engine, *prompts: Any) -> list[Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=STEPS)
    return list(engine.llm.generate(list(prompts), settings, use_tqdm=False))


def embeddings_of(engine: Engine, reference: Reference, question: str, image: Tensor) -> Tensor:
    tokenizer = engine.llm.get_tokenizer()
    ids = (
        tokenizer.encode("USER: "),
        tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False),
    )
    before, after = (reference.embedding[torch.tensor(each)] for each in ids)
    return torch.cat([before, image, after])


def test_answers_equal_the_language_model_given_the_kept_tokens(
    engine: Engine, language_model: Engine, model: Path
) -> None:
    reference = Reference(model)
    answers = set()
    for name in ("astronaut", "coffee"):
        rows, seen = reference.encode(photo(name))
        for budget in (None, 1, 6):
            engine.clear_caches()
            # Embeddings in a request have consecutive positions.
            own = {} if budget is None else {"visual_positions": "closed"}
            (output,) = ask(engine, prompt_of(QUESTIONS[0], budget, name, **own))
            kept = list(range(TOKENS)) if budget is None else engine.kept()[-1]["kept"]
            assert len(kept) == (budget or TOKENS)
            stay = torch.cat([rows[:1], rows[1:-1][torch.tensor(kept)], rows[-1:]])
            fed = embeddings_of(engine, reference, QUESTIONS[0], stay)
            assert len(output.prompt_token_ids) == len(fed)
            (expected,) = ask(language_model, {"prompt_embeds": fed})
            assert token_ids(output) == token_ids(expected), (name, budget)
            answers.add(tuple(token_ids(output)))
        # Half of the kept tokens are the most salient ones.
        ask(engine, prompt_of(QUESTIONS[0], 6, name, visual_selector="vispruner"))
        assert set(seen.topk(3).indices.tolist()) < set(engine.kept()[-1]["kept"])
    assert len(answers) > 2


@pytest.mark.parametrize("chunk", [4096, 8], ids=["at once", "in chunks"])
def test_begin_kept_tokens_and_end_have_the_positions_they_have_without_pruning(
    chunk: int, start_engine: StartEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with start_engine(model, max_num_batched_tokens=chunk) as engine:
        seen: list[int] = []

        def watch(whole: Any) -> None:
            inner = whole.transformer
            forward = inner.forward

            def recorded(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
                seen.extend(positions.tolist())
                return forward(input_ids, positions, *args, **kwargs)

            inner.forward = recorded

        engine.llm.apply_model(watch)
        (output,) = ask(engine, prompt_of(QUESTIONS[0], 6))
        (record,) = engine.kept()
        before = len(engine.llm.get_tokenizer().encode("USER: "))
        behind = before + TOKENS + 2
        after = len(output.prompt_token_ids) - before - 8
        assert seen == [
            *range(before),
            before,
            *(before + 1 + place for place in record["kept"]),
            before + TOKENS + 1,
            *range(behind, behind + after + STEPS - 1),
        ]


def test_requests_in_a_mixed_batch_and_from_caches_answer_as_alone(engine: Engine) -> None:
    prompts = [prompt_of(question, each) for question in QUESTIONS for each in (None, 1, 7, 0.5)]
    alone = []
    for prompt in prompts:
        engine.clear_caches()
        alone.append(token_ids(ask(engine, prompt)[0]))
    engine.clear_caches()
    together = ask(engine, *prompts)
    assert [token_ids(output) for output in together] == alone
    lengths = [len(output.prompt_token_ids) for output in together]
    assert [lengths[0] - length for length in lengths[:4]] == [
        0,
        TOKENS - 1,
        TOKENS - 7,
        TOKENS / 2,
    ]
    assert [token_ids(output) for output in ask(engine, *prompts)] == alone


def test_a_budget_of_all_tokens_equals_stock(engine: Engine) -> None:
    engine.clear_caches()
    before = len(engine.kept())
    stock, whole = (ask(engine, prompt_of(QUESTIONS[0], budget))[0] for budget in (None, TOKENS))
    assert token_ids(whole) == token_ids(stock)
    assert len(engine.kept()) == before


@pytest.mark.parametrize("name", ["visionzip", "prumerge+"])
def test_merging_selectors_keep_the_exact_count(engine: Engine, name: str) -> None:
    (merged,) = ask(engine, prompt_of(QUESTIONS[0], 6, visual_selector=name))
    assert engine.kept()[-1]["kept"] is None
    (plain,) = ask(engine, prompt_of(QUESTIONS[0], 6))
    assert len(merged.prompt_token_ids) == len(plain.prompt_token_ids)
