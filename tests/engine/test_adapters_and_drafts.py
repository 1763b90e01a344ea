# SPDX-License-Identifier: Apache-2.0
"""Budgets together with LoRA adapters, speculative decoding and several ranks.

The same requests give the same answers and the same kept tokens as on an engine without them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from testing.photo import photo
from testing.tiny import qwen_vl
from testing.tiny.attachments import build_adapter, build_eagle, take_language_model
from testing.tiny.onevision import build_onevision
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids

REQUESTS = [
    (question, budget)
    for question in ("what color is the suit?", "where is the flag?")
    for budget in (64, None, 0.25)
]
WORDS = 16
STEADY = "divprune"
"""A selector whose tokens do not depend on the last bits. Two ranks with half of a tower each round
differently from one, and Algorithm 1 of `flashvlm` amplifies the difference."""


LLAVA = "USER: <image>\n{question} ASSISTANT:"
QWEN = (
    f"{qwen_vl.TURN}user\n{qwen_vl.START}{qwen_vl.IMAGE}{qwen_vl.END}{{question}}"
    f"{qwen_vl.OVER}\n{qwen_vl.TURN}assistant\n"
)
N_GRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


class Answers(NamedTuple):
    """The answers of an engine, and the kept tokens of the request's image."""

    words: list[list[int]]
    kept: set[tuple[int, ...]]


def ask(
    engine: Engine,
    adapters: Sequence[Any] = (None,) * len(REQUESTS),
    *,
    form: str = LLAVA,
    selector: str = "flashvlm",
) -> Answers:
    """Send all requests at once, and each alone with cleared caches; the answers must be equal."""
    from vllm import SamplingParams

    prompts = [
        {
            "prompt": form.format(question=question),
            "multi_modal_data": {"image": photo("astronaut")},
            "mm_processor_kwargs": {"visual_budget": budget, "visual_selector": selector},
        }
        for question, budget in REQUESTS
    ]
    settings = SamplingParams(temperature=0, max_tokens=WORDS)

    def words(start: int, end: int) -> list[list[int]]:
        outputs = engine.llm.generate(
            prompts[start:end],  # type: ignore[arg-type]
            settings,
            use_tqdm=False,
            lora_request=list(adapters[start:end]),
        )
        return [token_ids(output) for output in outputs]

    engine.clear_caches()
    together = words(0, len(prompts))
    alone = []
    for number in range(len(prompts)):
        engine.clear_caches()
        alone += words(number, number + 1)
    assert together == alone
    return Answers(together, {tuple(record["kept"]) for record in engine.kept()})


@pytest.fixture(scope="module")
def plain(start_engine: StartEngine, clip_llava: Path) -> Answers:
    with start_engine(clip_llava) as engine:
        answers = ask(engine)
    assert len({tuple(words) for words in answers.words}) > 2, "the answers hang on nothing"
    return answers


def test_adapters_change_the_answers_but_not_the_kept_tokens(
    start_engine: StartEngine, clip_llava: Path, plain: Answers, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    layers = [
        f"language_model.model.layers.{number}.self_attn.{name}_proj"
        for number in range(4)
        for name in "qkvo"
    ]
    # The second also changes the embeddings of the question's words.
    adapters = [
        LoRARequest(name, number, str(build_adapter(tmp_path / name, clip_llava, targets, size=1)))
        for number, (name, targets) in enumerate(
            {"layers": layers, "vocabulary": [*layers, "embed_tokens"]}.items(), start=1
        )
    ]
    # Every batch has requests with each of two adapters and without one.
    columns = [None, *adapters]
    answers = []
    # One slot more than adapters: on a CPU vLLM uses the last slot for requests without an adapter.
    with start_engine(clip_llava, enable_lora=True, max_loras=3, max_lora_rank=8) as engine:
        for shift in range(3):
            turns = [columns[(number + shift) % 3] for number in range(len(REQUESTS))]
            result = ask(engine, turns)
            assert result.kept == plain.kept
            answers.append(result.words)
    for number, without in enumerate(plain.words):
        by_adapter = {(number + shift) % 3: answers[shift][number] for shift in range(3)}
        assert by_adapter[0] == without
        assert len({tuple(words) for words in by_adapter.values()}) == 3


def drafts(engine: Engine) -> dict[str, float]:
    """Return the number of drafted and of accepted tokens."""
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.llm.get_metrics()}
    return {name: values[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted")}


def test_n_gram_speculation_does_not_change_answers(
    start_engine: StartEngine, clip_llava: Path, plain: Answers
) -> None:
    with start_engine(clip_llava, speculative_config=N_GRAM, disable_log_stats=False) as engine:
        assert ask(engine) == plain
        counted = drafts(engine)
    assert 0 < counted["accepted"] < counted["draft"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle3", "draft_model"])
def test_speculation_with_a_draft_model_does_not_change_answers(
    method: str, start_engine: StartEngine, clip_llava: Path, plain: Answers, tmp_path: Path
) -> None:
    write = {"eagle3": build_eagle, "draft_model": take_language_model}[method]
    settings = {
        "method": method,
        "model": str(write(tmp_path / method, clip_llava)),
        "num_speculative_tokens": 3,
    }
    # Prefill chunks end within images; the drafter reads the next token.
    with start_engine(
        clip_llava,
        speculative_config=settings,
        max_num_batched_tokens=200,
        disable_log_stats=False,
    ) as engine:
        assert ask(engine) == plain
        assert drafts(engine)["draft"] > 0


@pytest.fixture(scope="module")
def plain_divprune(start_engine: StartEngine, clip_llava: Path) -> Answers:
    with start_engine(clip_llava) as engine:
        return ask(engine, selector=STEADY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        # LLaVA's tower does not support this: vLLM logs it and shards the weights.
        {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
        # Without compilation, vLLM's CPU runner has no buffer for the output of a pipeline stage.
        {
            "pipeline_parallel_size": 2,
            "enforce_eager": False,
            "compilation_config": {"mode": 2, "backend": "eager"},
        },
    ],
    ids=["tensor-parallel", "encoder-data-parallel", "pipeline-parallel"],
)
def test_several_ranks_answer_as_one_rank(
    arguments: dict[str, Any],
    start_engine: StartEngine,
    clip_llava: Path,
    plain_divprune: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By default vLLM requires a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with start_engine(clip_llava, **arguments) as engine:
        assert ask(engine, selector=STEADY) == plain_divprune


@pytest.fixture(scope="module")
def plain_qwen(start_engine: StartEngine) -> Answers:
    path = qwen_vl.build_qwen_vl(REPOSITORY / ".models" / "qwen2.5-vl", "2.5")
    with start_engine(path) as engine:
        return ask(engine, form=QWEN)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["n-gram", "eagle3", "encoder-data-parallel"])
def test_mrope_positions_are_unchanged_by_speculation_and_several_ranks(
    way: str,
    start_engine: StartEngine,
    plain_qwen: Answers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = qwen_vl.build_qwen_vl(REPOSITORY / ".models" / "qwen2.5-vl", "2.5")
    arguments: dict[str, Any] = {}
    if way == "n-gram":
        arguments["speculative_config"] = N_GRAM
    elif way == "eagle3":
        arguments["speculative_config"] = {
            "method": "eagle3",
            "model": str(build_eagle(tmp_path / way, path)),
            "num_speculative_tokens": 3,
        }
        arguments["max_num_batched_tokens"] = 100
    else:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        arguments |= {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}
    with start_engine(path, **arguments) as engine:
        assert ask(engine, form=QWEN) == plain_qwen
        if "tensor_parallel_size" in arguments:
            assert engine.kept(rank=0) == engine.kept(rank=1)


@pytest.mark.slow
def test_two_ranks_of_onevision_answer_as_one_rank(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_onevision(REPOSITORY / ".models" / "onevision")
    with start_engine(path) as engine:
        alone = ask(engine)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # OneVision's tower does not support data parallelism either: its weights are sharded.
    with start_engine(path, tensor_parallel_size=2, mm_encoder_tp_mode="data") as engine:
        assert ask(engine) == alone
        assert engine.kept(rank=0) == engine.kept(rank=1)
