# SPDX-License-Identifier: Apache-2.0
"""Selectors that read the language model's attention, on LLaVA: tokens, passes, adapters, ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashvlm_vllm.selection.registry import BUILT_IN
from flashvlm_vllm.selection.selectors import run_selector
from testing.photo import photo
from testing.tiny.attachments import build_adapter
from tests.engine import first_layers
from tests.engine.conftest import Engine, StartEngine, token_ids
from tests.engine.test_selectors import Seen

QUESTIONS = ("what color is the suit?", "where is the flag and what is behind it?", "who?")
USING = [name for name, selector in BUILT_IN.items() if selector.uses_llm]
OTHERS = [name for name, selector in BUILT_IN.items() if not selector.uses_llm]
DEFAULT = "llm-attention"


@pytest.fixture(scope="module")
def engine(clip_llava: Path, start_engine: StartEngine) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with start_engine(clip_llava, block_size=32, max_num_batched_tokens=2048) as started:
            started.llm.apply_model(first_layers.watch)
            yield started


@pytest.fixture(autouse=True)
def nothing_recorded(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        first_layers.seen(request.getfixturevalue("engine"))


@pytest.fixture(scope="module")
def seen(clip_llava: Path) -> Seen:
    return Seen(clip_llava, photo("astronaut"))


def prompts_read(engine: Engine) -> list[int]:
    """Return the number of prompts of each dense pass since the last look."""
    return [len(call) for call in first_layers.seen(engine).calls]


@pytest.mark.parametrize("name", USING)
def test_the_kept_tokens_follow_from_transformers_attention(
    name: str, engine: Engine, seen: Seen
) -> None:
    kept = set()
    for question in QUESTIONS[:2]:
        for budget in (16, 64, 300):
            engine.ask(question, budget, selector=name, max_tokens=1)
            record = engine.kept()[-1]
            tokens = seen.tokens(record["query"], BUILT_IN[name], budget)
            assert tokens.attention is not None
            expected = run_selector(name, BUILT_IN[name], tokens, trusted=False).spots
            different = set(record["kept"]) ^ set(expected.tolist())
            # Beyond the dimensions of the features, rounding decides between equal gains.
            is_exact = name != "llm-attention" or budget <= tokens.features.shape[1]
            assert len(different) <= (0 if is_exact else budget // 50), (question, budget)
            kept.add(tuple(record["kept"]))
    assert len(kept) == 6, "the question would not matter"


def test_each_question_takes_one_pass(engine: Engine) -> None:
    for number, question in enumerate(("is there one pass?", "and for the second question?")):
        first = token_ids(engine.ask(question, 64, selector=DEFAULT))
        assert prompts_read(engine) == [1], number
        # The image is needed again, and is no longer in vLLM's caches.
        engine.llm.reset_prefix_cache()
        engine.crowd_out()
        encoded = engine.features()["hits"]
        assert token_ids(engine.ask(question, 64, selector=DEFAULT)) == first
        assert engine.features()["hits"] == encoded + 1
        assert prompts_read(engine) == [], number


@pytest.mark.parametrize("selector", [*OTHERS, None])
def test_other_requests_take_no_pass(engine: Engine, selector: str | None) -> None:
    engine.clear_caches()
    engine.ask("no pass?", None if selector is None else 64, selector=selector)
    assert prompts_read(engine) == []


def test_an_image_that_is_kept_whole_takes_no_pass(engine: Engine) -> None:
    engine.clear_caches()
    engine.ask("no pass?", 576, selector=DEFAULT)
    assert prompts_read(engine) == []


def test_items_of_a_batch_are_read_together_and_as_alone(engine: Engine) -> None:
    requests = [(f"{question} alone or together?", 64) for question in QUESTIONS]
    images = [photo("astronaut"), photo("cat").resize((200, 300))]
    alone = []
    for each in requests:
        engine.clear_caches()
        (output,) = engine.ask_all([each], images, selector=DEFAULT)
        alone.append((token_ids(output), [one["kept"] for one in engine.kept()[-2:]]))
    assert sum(prompts_read(engine)) == 6
    # Another budget first: the attention of these questions is then no longer looked up.
    engine.clear_caches()
    engine.llm.apply_model(forget)
    before = len(engine.kept())
    outputs = engine.ask_all(requests, images, selector=DEFAULT)
    passes = prompts_read(engine)
    assert sum(passes) == 6 and max(passes) > 1
    together = [one["kept"] for one in engine.kept()[before:]]
    assert sorted(together) == sorted(each for _, kept in alone for each in kept)
    assert [token_ids(output) for output in outputs] == [words for words, _ in alone]


def forget(model: Any) -> None:
    """Clear the plugin's caches in the worker."""
    model.clear_caches()


def test_blocks_of_pruned_images_are_found_in_the_prefix_cache(engine: Engine) -> None:
    engine.clear_caches()
    cold = engine.ask(QUESTIONS[0], 200, selector=DEFAULT)
    warm = engine.ask(QUESTIONS[0], 200, selector=DEFAULT)
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == (len(warm.prompt_token_ids) - 1) // 32 * 32 >= 192
    assert token_ids(warm) == token_ids(cold)


def test_without_words_the_tokens_are_those_of_flashvlm_2(engine: Engine) -> None:
    for question in ("", " \n "):
        kept = []
        for name in (DEFAULT, "flashvlm-2"):
            engine.clear_caches()
            assert engine.ask(question, 64, selector=name).outputs[0].token_ids
            record = engine.kept()[-1]
            assert record["query"] == []
            kept.append(record["kept"])
        assert kept[0] == kept[1]
    # No selector reads a prompt without a question.
    assert prompts_read(engine) == []


Tokens = dict[tuple[str, str], list[int]]


def kept_of(engine: Engine, **arguments: Any) -> Tokens:
    """Return the kept tokens of each selector for each question, each asked alone."""
    from vllm import SamplingParams

    kept = {}
    for name in USING:
        for question in QUESTIONS[:2]:
            prompt: Any = {
                "prompt": f"USER: <image>\n{question} ASSISTANT:",
                "multi_modal_data": {"image": photo("astronaut")},
                "mm_processor_kwargs": {"visual_budget": 64, "visual_selector": name},
            }
            engine.clear_caches()
            engine.llm.generate([prompt], SamplingParams(max_tokens=2), use_tqdm=False, **arguments)
            kept[name, question] = engine.kept()[-1]["kept"]
    return kept


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Tokens:
    return kept_of(engine)


@pytest.mark.slow
def test_the_kept_tokens_do_not_depend_on_an_adapter(
    start_engine: StartEngine, clip_llava: Path, plain: Tokens, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    layers = [
        f"language_model.model.layers.{number}.self_attn.{name}_proj"
        for number in range(4)
        for name in "qkvo"
    ]
    adapter = build_adapter(tmp_path / "adapter", clip_llava, [*layers, "embed_tokens"], size=1)
    request = LoRARequest("adapter", 1, str(adapter))
    with start_engine(clip_llava, enable_lora=True, max_loras=2, max_lora_rank=8) as engine:
        words = [
            token_ids(engine.llm.generate(prompt, lora_request=own, use_tqdm=False)[0])
            for prompt in ["USER: where is the flag? ASSISTANT:"]
            for own in (request, None)
        ]
        assert words[0] != words[1], "the adapter would change nothing"
        # The first request with an adapter: nothing is known from one without.
        assert kept_of(engine, lora_request=request) == plain
        engine.llm.reset_prefix_cache()
    with start_engine(clip_llava, enable_lora=True, max_loras=2, max_lora_rank=8) as engine:
        assert kept_of(engine) == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, {"tensor_parallel_size": 2}),
        # Without compilation, vLLM's CPU runner has no buffer for the output of a pipeline stage.
        (
            1,
            {
                "pipeline_parallel_size": 2,
                "enforce_eager": False,
                "compilation_config": {"mode": 2, "backend": "eager"},
            },
        ),
    ],
    ids=["tensor-parallel", "pipeline-parallel"],
)
def test_several_ranks_keep_the_tokens_of_one_rank(
    ranks: int,
    arguments: dict[str, Any],
    start_engine: StartEngine,
    clip_llava: Path,
    plain: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By default vLLM requires a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if "pipeline_parallel_size" in arguments:
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    with start_engine(clip_llava, **arguments) as engine:
        assert kept_of(engine) == plain
        for rank in range(ranks):
            assert engine.kept(rank) == engine.kept(0)
