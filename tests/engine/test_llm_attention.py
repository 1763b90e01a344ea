# SPDX-License-Identifier: Apache-2.0
"""The first decoder layers as the attention reader runs them, against vLLM's own prefill.

For every type of language model that selectors may use: query, key and value at the second layer's
attention are those of the same prompt without a budget, for all tokens or for the half that passes
the first layer. Those of the words at the third's are equal where all pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvlm_vllm.language_models import LANGUAGE_MODELS
from flashvlm_vllm.worker.item_prompt import Prompt
from testing.photo import photo
from testing.tiny import gemma3, internvl, mistral3, qwen_vl
from testing.tiny.glm4_1v import build_glm4_1v
from testing.tiny.internvl import build_internvl_hf
from testing.tiny.llava import build_llava
from testing.tiny.quantized import build_int8_llava
from testing.tiny.qwen3_vl import build_qwen3_vl
from testing.tiny.qwen_vl import build_qwen_vl
from tests.engine import first_layers
from tests.engine.conftest import REPOSITORY, Engine, StartEngine
from tests.engine.reference import UserTurnIds

QUESTION = "what color is the suit?"
MODELS = REPOSITORY / ".models"


@dataclass(frozen=True)
class Family:
    """A tiny model with a type of language model."""

    build: Callable[[], Path]
    image: str
    """What stands for an image in a prompt."""
    token: str
    """The image's token in a processed prompt."""
    writes_text: bool = False
    """Whether the processor writes text around or between an image's tokens."""
    arguments: dict[str, Any] = field(default_factory=dict)
    equal_rows: float = 1.0
    """Share of the rows that must be equal."""


QWEN = (qwen_vl.IMAGE, qwen_vl.IMAGE)
SLIDING = {"hf_overrides": {"text_config": {"sliding_window": 24}}}
FAMILIES = {
    "llama": Family(lambda: build_llava(MODELS / "llava-clip"), "<image>", "<image>"),
    "qwen2_vl_text": Family(lambda: build_qwen_vl(MODELS / "qwen2-vl", "2"), *QWEN),
    "gemma3_text": Family(
        lambda: gemma3.build_gemma3(MODELS / "gemma3"), gemma3.START, gemma3.SOFT, True
    ),
    "qwen2": Family(
        lambda: build_internvl_hf(MODELS / "internvl-hf"), internvl.CONTEXT, internvl.CONTEXT, True
    ),
    "qwen3": Family(
        lambda: build_internvl_hf(MODELS / "internvl-qwen3", "qwen3"),
        internvl.CONTEXT,
        internvl.CONTEXT,
        True,
    ),
    "qwen2_5_vl_text": Family(lambda: build_qwen_vl(MODELS / "qwen2.5-vl", "2.5"), *QWEN),
    "qwen3_vl_text": Family(lambda: build_qwen3_vl(MODELS / "qwen3-vl"), *QWEN),
    "glm4v_text": Family(lambda: build_glm4_1v(MODELS / "glm4.1v"), "<|image|>", "<|image|>"),
    "mistral": Family(
        lambda: mistral3.build_mistral3(MODELS / "mistral3"),
        mistral3.IMAGE,
        mistral3.IMAGE,
        True,
        SLIDING,
    ),
}
INT8 = "llama, int8"
"""A quantized language model: its linear layers are called, and its weights are never read."""
FAMILIES[INT8] = Family(
    lambda: build_int8_llava(MODELS / "llava-int8"),
    "<image>",
    "<image>",
    # Float32 rounds otherwise in a batch of other lengths. Where a value lies between two integers,
    # that changes the row's quantized activations: one row of 594 in the first run.
    equal_rows=0.98,
)
FAST = ("llama", INT8, "qwen2_vl_text", "gemma3_text")


@pytest.fixture(
    scope="module",
    params=[
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
    ],
)
def served(
    request: pytest.FixtureRequest, start_engine: StartEngine
) -> Iterator[tuple[Family, Engine]]:
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with start_engine(family.build(), **family.arguments) as engine:
            config = engine.llm.llm_engine.model_config.hf_text_config
            assert config.model_type == request.param.split(",")[0]
            engine.llm.apply_model(first_layers.watch)
            yield family, engine


def ask(engine: Engine, ids: list[int], **arguments: Any) -> list[int]:
    """Ask about a photograph; return the ids of the processed prompt."""
    from vllm import SamplingParams

    prompt = {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": photo("astronaut")},
        "mm_processor_kwargs": arguments,
    }
    settings = SamplingParams(temperature=0, max_tokens=1)
    (output,) = engine.llm.generate([prompt], settings, use_tqdm=False)  # type: ignore[list-item]
    return list(output.prompt_token_ids)


def halved(prompt: Prompt) -> Prompt:
    """Let every other visual token of a prompt pass the first layer."""
    return replace(prompt, passing=torch.arange(0, len(prompt.visual), 2))


def assert_equal(
    one: first_layers.Run,
    other: first_layers.Run,
    prompt: Prompt,
    rows: float,
) -> None:
    """Compare the reader's run of a prompt with vLLM's; ``rows`` is the share that must be equal.

    The visual tokens pass one layer in the reader, so in the third only the words are compared, and
    these only where they see all visual tokens in the second.
    """
    carried = prompt.carried()
    other = other.at(carried.places)
    assert torch.equal(one.positions, other.positions)
    (second, third), (expected_second, expected_third) = one.inputs, other.inputs
    pairs = [(one.embeddings, other.embeddings), *zip(second, expected_second, strict=True)]
    words = carried.words()
    read = [(own[words], each[words]) for own, each in zip(third, expected_third, strict=True)]
    if len(carried) == len(prompt):
        pairs += read
    else:
        assert not any(torch.allclose(*each, rtol=1e-4, atol=1e-6) for each in read)
    assert not torch.equal(third[1][carried.image], expected_third[1][carried.image])
    for own, expected in pairs:
        assert own.shape == expected.shape
        if rows == 1:
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
            continue
        close = torch.isclose(own, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
        assert float(close.flatten(1).all(dim=1).float().mean()) >= rows


def test_every_allowed_type_has_a_model_here() -> None:
    assert {name.split(",")[0] for name in FAMILIES} == LANGUAGE_MODELS


def test_the_layers_get_the_inputs_of_the_unpruned_prompt(
    served: tuple[Family, Engine],
) -> None:
    family, engine = served
    words = UserTurnIds(engine.llm.get_tokenizer())
    ids = words.around(family.image, QUESTION)
    whole = torch.tensor(ask(engine, ids))
    (expected,) = first_layers.seen(engine).served
    ask(engine, ids, visual_budget=8, visual_selector="llm-attention", visual_query=QUESTION)
    ((half,),) = first_layers.seen(engine).calls
    assert len(half.passing) == (len(half.visual) + 1) // 2
    ask(engine, ids, visual_budget=8, visual_selector="fastv-boundary", visual_query=QUESTION)
    seen = first_layers.seen(engine)
    ((prompt,),) = seen.calls
    is_visual = whole == words.ids(family.token)[0]
    assert len(prompt.passing) == len(prompt.visual)
    assert 8 < len(prompt.visual) == int(is_visual.sum())
    assert torch.equal(prompt.visual, expected.embeddings[is_visual])
    assert prompt.question_words == len(words.ids(QUESTION))
    if not family.writes_text:
        (run,) = seen.read
        assert_equal(run, expected, prompt, family.equal_rows)
        # Prompts of several lengths at once.
        few = slice(0, 3)
        deeper = None if prompt.deeper is None else prompt.deeper[few]
        short = replace(
            prompt,
            visual=prompt.visual[few],
            positions=prompt.positions[few],
            passing=prompt.passing[few],
            deeper=deeper,
        )
        assert_read_together(engine, prompt, short, expected, family.equal_rows)
        assert_read_together(engine, half, short, expected, family.equal_rows)
        return
    # The reader's prompt has none of that text, so it also reads the embeddings that vLLM read.
    first, last = is_visual.nonzero().aminmax()
    rows = expected.embeddings
    before, after = rows[: len(words.before)], rows[-len(prompt.after) :]
    assert torch.equal(prompt.before, before) and torch.equal(prompt.after, after)
    span = slice(int(first), int(last) + 1)
    same = Prompt(
        rows[span],
        rows[: span.start],
        rows[span.stop :],
        prompt.question_words,
        torch.arange(span.stop - span.start)[:, None],
        torch.arange(span.stop - span.start),
    )
    assert_read_together(engine, same, prompt, expected, family.equal_rows)
    assert_read_together(engine, halved(same), prompt, expected, family.equal_rows)


def assert_read_together(
    engine: Engine, prompt: Prompt, other: Prompt, expected: first_layers.Run, rows: float
) -> None:
    """Read a prompt twice with another between, and compare both with vLLM's run of it."""
    engine.llm.apply_model(first_layers.reading([prompt, other, prompt]))
    (run,) = first_layers.seen(engine).read
    length = len(prompt.carried())
    for place in (slice(0, length), slice(-length, None)):
        assert_equal(run.at(place), expected, prompt, rows)


def test_the_memory_of_a_pass_is_bounded(served: tuple[Family, Engine]) -> None:
    family, engine = served
    ids = UserTurnIds(engine.llm.get_tokenizer()).around(family.image, QUESTION)
    ask(engine, ids, visual_budget=9, visual_selector="llm-attention", visual_query=QUESTION)
    ((prompt,),) = first_layers.seen(engine).calls
    for prompts in ([prompt], [prompt] * 5):
        ((peak, bound),) = engine.llm.apply_model(first_layers.peak_of(prompts))
        assert bound / 6 < peak <= bound
