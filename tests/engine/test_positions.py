# SPDX-License-Identifier: Apache-2.0
"""Positions of the tokens of pruned prompts, recorded at the language model of a running engine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from testing.photo import photo
from tests.engine.conftest import REPOSITORY, Engine, StartEngine, token_ids

QUESTION = "what color is the suit?"
TOKENS = 576
TABLE = 4096


class PositionRecorder:
    """An engine in this process that records the positions given to its language model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: list[list[int]] = []
        engine.llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        inner = model.language_model.model
        forward = inner.forward

        def noted(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
            assert positions.dim() == 1
            self.seen.append(positions.tolist())
            return forward(input_ids, positions, *args, **kwargs)

        inner.forward = noted

    def ask(self, prompt: str, images: Sequence[Any], tokens: int = 3, **own: Any) -> Any:
        """Send one request with cleared caches; return vLLM's output."""
        from vllm import SamplingParams

        self.engine.clear_caches()
        self.seen.clear()
        (output,) = self.engine.llm.generate(
            {  # type: ignore[arg-type]
                "prompt": prompt,
                "multi_modal_data": {"image": list(images)},
                "mm_processor_kwargs": own,
            },
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
            use_tqdm=False,
        )
        return output

    @property
    def positions(self) -> list[int]:
        """Return the positions of the last request and its answer."""
        return [each for step in self.seen for each in step]


@pytest.fixture(scope="module", params=[4096, 64], ids=["at once", "in chunks"])
def watched(
    request: pytest.FixtureRequest, start_engine: StartEngine, clip_llava: Path
) -> Iterator[PositionRecorder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        tokens = {"max_num_batched_tokens": request.param, "max_num_seqs": 8}
        with start_engine(clip_llava, max_model_len=2048, **tokens) as engine:
            yield PositionRecorder(engine)


FORMS = {
    "one": "USER: <image>\n{} ASSISTANT:",
    "two side by side": "USER: <image><image>\n{} ASSISTANT:",
    "first and last": "<image>{}<image>",
    "alone": "<image>",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [1, 100])
def test_kept_tokens_have_the_positions_they_have_without_pruning(
    watched: PositionRecorder, form: str, budget: int
) -> None:
    prompt = FORMS[form].format(QUESTION)
    images = [photo("astronaut"), photo("cat")][: prompt.count("<image>")]
    before = len(watched.engine.kept())
    output = watched.ask(prompt, images, visual_budget=budget)
    records = watched.engine.kept()[before:]
    kept = iter([each["kept"] for each in records])
    token = image_token()
    expected, base, ids = [], 0, list(output.prompt_token_ids)
    index = 0
    while index < len(ids):
        if ids[index] == token:
            expected += [base + place for place in next(kept)]
            index, base = index + budget, base + TOKENS
        else:
            expected.append(base)
            index, base = index + 1, base + 1
    assert watched.positions == [*expected, base, base + 1]


def image_token() -> int:
    config = json.loads((REPOSITORY / ".models" / "llava-clip" / "config.json").read_text())
    return int(config["image_token_index"])


def test_closed_positions_are_consecutive(watched: PositionRecorder) -> None:
    prompt = FORMS["two side by side"].format(QUESTION)
    images = [photo("astronaut"), photo("cat")]
    closed = watched.ask(prompt, images, visual_budget=20, visual_positions="closed")
    assert watched.positions == list(range(len(closed.prompt_token_ids) + 2))
    for positions in ("kept", None):
        kept = watched.ask(prompt, images, visual_budget=20, visual_positions=positions)
        assert watched.positions != list(range(len(closed.prompt_token_ids) + 2))
        assert token_ids(kept) != token_ids(closed)


@pytest.mark.parametrize("answer", [1, 16, 600, None])
def test_twenty_images_in_a_context_of_2048_fit_the_rotary_table(
    watched: PositionRecorder, answer: int | None
) -> None:
    images = [photo("astronaut").resize((336, 300 + number)) for number in range(20)]
    prompt = f"USER: {'<image>' * 20}\n{QUESTION} ASSISTANT:"
    output = watched.ask(prompt, images, answer, visual_budget=32)
    count = len(output.prompt_token_ids)
    positions = watched.positions
    assert (answer or 0) <= len(positions) - count + 1
    assert sorted(set(positions)) == positions
    assert positions[-1] < TABLE
    if answer is not None:
        # The last token of the answer is not processed by the model.
        assert positions[-1] == TABLE - 2
        assert len(token_ids(output)) == answer
    else:
        # A quarter of the context is reserved for an answer without a limit.
        assert len(token_ids(output)) >= 512
    # Adjacent tokens stay adjacent, and every image has its share of the gaps.
    assert positions[count - 1] - count > 1000


def test_positions_stay_inside_the_rotary_table_as_images_are_added(
    watched: PositionRecorder,
) -> None:
    """One image more at a time: positions change continuously at the limit of the table."""
    images = [photo("astronaut").resize((336, 300 + number)) for number in range(9)]
    ends = []
    for number in range(5, 9):
        prompt = f"USER: {'<image>' * number}\n{QUESTION} ASSISTANT:"
        watched.ask(prompt, images[:number], 16, visual_budget=32)
        ends.append(watched.positions[-1])
    assert ends == sorted(ends)
    assert ends[-1] == TABLE - 2


def test_kept_and_closed_positions_in_one_batch_and_in_the_caches(
    start_engine: StartEngine, clip_llava: Path
) -> None:
    cases = [
        (f"{QUESTION} {number}", budget, positions)
        for number in range(2)
        for budget in (None, 64, 300)
        for positions in ("kept", "closed")
    ]

    def ask(engine: Engine, requests: Sequence[Any]) -> list[Any]:
        from vllm import SamplingParams

        prompts = [
            {
                "prompt": f"USER: <image>\n{question} ASSISTANT:",
                "multi_modal_data": {"image": photo("astronaut")},
                "mm_processor_kwargs": {"visual_budget": budget, "visual_positions": positions},
            }
            for question, budget, positions in requests
        ]
        settings = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
        return list(engine.llm.generate(prompts, settings, use_tqdm=False))  # type: ignore[arg-type]

    with start_engine(clip_llava, max_num_batched_tokens=128, max_num_seqs=4) as engine:
        alone = []
        for each in cases:
            engine.clear_caches()
            alone.append(token_ids(ask(engine, [each])[0]))
        engine.clear_caches()
        assert [token_ids(each) for each in ask(engine, cases)] == alone
        # Again, from the caches; kept and closed positions share no blocks.
        again = ask(engine, cases)
        assert [token_ids(each) for each in again] == alone
        # A block holds 128 tokens, more than a prompt of 64 visual tokens.
        long = [each for each, (_, budget, _) in zip(again, cases, strict=True) if budget != 64]
        assert all(each.num_cached_tokens > 0 for each in long)
        for kept, closed in ((2, 3), (4, 5)):
            assert alone[kept] != alone[closed]
            engine.clear_caches()
            ask(engine, [cases[kept]])
            (other,) = ask(engine, [cases[closed]])
            assert not other.num_cached_tokens
            assert token_ids(other) == alone[closed]
        assert alone[0] == alone[1]


STOCK = """
import json, os, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from testing.photo import photo

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=4096,
              max_num_seqs=8, max_num_batched_tokens=int(sys.argv[2]))
    own = json.loads(sys.argv[3])
    image, other = photo("astronaut"), photo("cat")
    prompts = [
        {"prompt": "USER: what is this? ASSISTANT:"},
        {"prompt": "USER: <image>\\nwhat is this? ASSISTANT:",
         "multi_modal_data": {"image": image}},
        {"prompt": "<image><image>", "multi_modal_data": {"image": [image, other]}},
        {"prompt": "USER: <image> and <image> ASSISTANT:",
         "multi_modal_data": {"image": [other, image]}},
    ]
    prompts = [{**each, "mm_processor_kwargs": own} if own else each for each in prompts]
    settings = SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True)
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    print("RESULT" + json.dumps([
        [[int(token), {str(key): each.logprob for key, each in step.items()}]
         for token, step in zip(out.outputs[0].token_ids, out.outputs[0].logprobs)]
        for out in outputs
    ]))
"""


@pytest.mark.parametrize("chunk", [4096, pytest.param(200, marks=pytest.mark.slow)])
def test_without_a_budget_answers_equal_stock_bit_for_bit(clip_llava: Path, chunk: int) -> None:
    def answers(plugins: str, **own: Any) -> Any:
        result = subprocess.run(
            [sys.executable, "-c", STOCK, str(clip_llava), str(chunk), json.dumps(own)],
            env={**os.environ, "VLLM_PLUGINS": plugins, "PYTHONPATH": str(REPOSITORY)},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        found = [line for line in result.stdout.splitlines() if "RESULT" in line]
        assert found, result.stderr[-2000:]
        return json.loads(found[0].split("RESULT")[1])

    stock = answers("")
    assert answers("flashvlm") == stock
    if chunk == 4096:
        assert answers("flashvlm", visual_budget=None) == stock
        assert answers("flashvlm", visual_budget=TOKENS) == stock
