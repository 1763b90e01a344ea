# SPDX-License-Identifier: Apache-2.0
"""One engine on the small VLM: counts, mixtures, caches, and how often it is right.

``python -m benchmarks.gpu.steps.engine --name NAME --runner 2``; with ``--stock`` vLLM without
the plugin, which answers the questions without budgets to be compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from PIL import Image

from benchmarks.accuracy.sets import Item, plain
from benchmarks.accuracy.statistics import share
from benchmarks.gpu import keys
from benchmarks.gpu.comparing import answers_file
from benchmarks.gpu.engines import engine_arguments
from benchmarks.gpu.offline import leave
from benchmarks.gpu.recorder import Recorder, scratch
from benchmarks.serving import plan
from small_vlm import WEIGHTS
from small_vlm.architecture import VISUAL_TOKENS

EXPECTED: Final = Path(__file__).parents[1] / "expected.json"
SEED: Final = 77
"""Of the questions; a set of their own."""
QUESTIONS: Final = 300
ALONE: Final = 24
"""Questions sent one at a time: the same batches in every engine, so equal kernels round alike."""
KEPT: Final = 40
"""Images whose kept tokens the expected answers hold."""
CHUNK: Final = 96
"""Tokens of a step with ``--chunks``; an image without a budget has 576."""
ANSWER_TOKENS: Final = 4
BUDGETS: Final = (None, *plan.BUDGETS)


def questions(count: int) -> list[Item]:
    """Return the first questions of the set."""
    return plain(QUESTIONS, SEED)[:count]


class SmallVLM:
    """An offline engine on the small VLM, and what it kept."""

    def __init__(self, items: Sequence[Item], trace: Path, **arguments: Any) -> None:
        """Start the engine.

        Args:
            items: the questions it will be asked.
            trace: folder for what is kept of each image.
            arguments: of vLLM's ``LLM``.

        """
        trace.mkdir(parents=True, exist_ok=True)
        self._trace = trace / "rank-0.jsonl"
        self._trace.unlink(missing_ok=True)
        os.environ["FLASHVLM_TRACE_DIR"] = str(trace)
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `who_runs` is sent to the worker
        from vllm import LLM

        self.items = items
        self._pictures = [Image.fromarray(item.pictures()[0]) for item in items]
        self.llm = LLM(
            **{"model": str(WEIGHTS), "max_model_len": 1024, "max_num_seqs": 32, **arguments}
        )

    def request(self, number: int, budget: object, question: str | None = None) -> dict[str, Any]:
        """Make one question's request; another ``question`` may be asked about its image."""
        text = question or self.items[number].question.text
        own = {} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}
        return {
            "prompt": f"USER: <image>\n{text} ASSISTANT:",
            "multi_modal_data": {"image": self._pictures[number]},
            **own,
        }

    def run(self, requests: Sequence[dict[str, Any]], **sampling: Any) -> list[Any]:
        """Answer requests greedily, all at once."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, **sampling)
        prompts: Any = list(requests)
        return list(self.llm.generate(prompts, settings, use_tqdm=False))

    def kept(self) -> list[list[int]]:
        """Return the kept tokens of every image so far."""
        if not self._trace.exists():
            return []
        return [json.loads(line)["kept"] for line in self._trace.read_text().splitlines()]

    def clear_caches(self) -> None:
        """Empty all caches, so that the next request is computed completely."""
        assert self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def visual_tokens(self, output: Any) -> int:
        """Count an answered prompt's placeholders."""
        image = json.loads((WEIGHTS / "config.json").read_text())["image_token_index"]
        return list(output.prompt_token_ids).count(image)


def text_of(output: Any) -> str:
    """Return an answer's text."""
    return str(output.outputs[0].text).strip()


def who_runs(worker: Any) -> dict[str, Any]:
    """Run in the worker: return the classes that it uses."""
    runner = worker.model_runner
    groups = getattr(runner, "attn_groups", None) or []
    backends = {
        group.backend.__name__
        for some in groups
        for group in (some if isinstance(some, list | tuple) else [some])
        if hasattr(group, "backend")
    }
    return {
        "runner": type(runner).__module__,
        "model": type(worker.get_model()).__module__,
        "attention": sorted(backends),
    }


def describe(recorder: Recorder, engine: SmallVLM, name: str, runner: int, stock: bool) -> None:
    """Record the worker's runner, model class and attention backend."""
    (found,) = engine.llm.collective_rpc(who_runs)
    is_second = ".gpu.model_runner" in found["runner"] or ".cpu.model_runner" in found["runner"]
    seen = f"{found['runner']}; attention {', '.join(found['attention']) or 'unknown'}"
    recorder.check(keys.of(name, keys.RUNNER), is_second == (runner == 2), seen)
    if not stock:
        ours = found["model"].startswith("flashvlm_vllm")
        recorder.check(f"{name}: the plugin's model class runs", ours, found["model"])


def ask_alone(engine: SmallVLM, count: int) -> list[dict[str, Any]]:
    """Ask questions without a budget one at a time: ids, and log-probabilities of each."""
    engine.clear_caches()
    rows = []
    for number in range(count):
        (output,) = engine.run([engine.request(number, None)], logprobs=1)
        answer = output.outputs[0]
        rows.append(
            {
                "ids": list(answer.token_ids),
                "logprobs": [
                    place[token].logprob
                    for place, token in zip(answer.logprobs, answer.token_ids, strict=True)
                ],
            }
        )
    return rows


def ask_all(engine: SmallVLM, budget: object) -> tuple[list[str], list[int], list[list[int]]]:
    """Ask every question at once: answers, placeholders of each, kept tokens of each."""
    engine.clear_caches()
    before = len(engine.kept())
    outputs = engine.run([engine.request(i, budget) for i in range(len(engine.items))])
    counts = [engine.visual_tokens(output) for output in outputs]
    return [text_of(output) for output in outputs], counts, engine.kept()[before:]


def ask_mixed(engine: SmallVLM, count: int) -> tuple[int, int]:
    """Send all budgets in one batch; return in how many answers the count is exact, of how many."""
    engine.clear_caches()
    plan = [(i, budget) for i in range(count) for budget in (*BUDGETS, 16, 0.25)]
    random.Random(0).shuffle(plan)
    outputs = engine.run([engine.request(i, budget) for i, budget in plan])
    exact = 0
    for (_, budget), output in zip(plan, outputs, strict=True):
        wanted = VISUAL_TOKENS if budget is None else budget
        wanted = round(VISUAL_TOKENS * wanted) if isinstance(wanted, float) else wanted
        exact += engine.visual_tokens(output) == wanted
    return exact, len(plan)


def two_questions(engine: SmallVLM) -> tuple[bool, str]:
    """Ask about one image: a question, the same again, another; the other with empty caches."""
    other = engine.items[1].question.text
    engine.clear_caches()
    (first,) = engine.run([engine.request(0, 64)])
    (again,) = engine.run([engine.request(0, 64)])
    (second,) = engine.run([engine.request(0, 64, other)])
    engine.clear_caches()
    (cold,) = engine.run([engine.request(0, 64, other)])
    hit = again.num_cached_tokens > 0
    same = list(first.outputs[0].token_ids) == list(again.outputs[0].token_ids)
    other_same = list(second.outputs[0].token_ids) == list(cold.outputs[0].token_ids)
    seen = (
        f"cached tokens {first.num_cached_tokens}, {again.num_cached_tokens}, "
        f"{second.num_cached_tokens}; the other question as in a cold cache: {other_same}"
    )
    return hit and same and other_same, seen


def measure_accuracy(recorder: Recorder, engine: SmallVLM, name: str) -> dict[str, list[str]]:
    """Send all questions at every budget; compare counts, answers and kept tokens with a CPU."""
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else None
    items, answers, exact, inside = engine.items, {}, True, True
    for budget in BUDGETS:
        texts, counts, kept = ask_all(engine, budget)
        answers[str(budget)] = texts
        wanted = budget or VISUAL_TOKENS
        exact = exact and set(counts) == {wanted}
        exact = exact and (budget is None or {len(each) for each in kept} == {wanted})
        right = share([t == i.question.answer for t, i in zip(texts, items, strict=True)])
        shown = f"{len(items)} questions"
        if expected is not None:
            theirs = expected["answers"][str(budget)][: len(items)]
            cpu = share([t == i.question.answer for t, i in zip(theirs, items, strict=True)])
            inside = inside and cpu.low <= right.value <= cpu.high
            same = sum(a == b for a, b in zip(texts, theirs, strict=True))
            shown += f"; a CPU {cpu.value:.3f} ({cpu.low:.3f} to {cpu.high:.3f}), {same} the same"
            if budget is not None:
                pairs = zip(kept, expected["kept"][str(budget)], strict=False)
                alike = [len(set(a) & set(b)) / len(b) for a, b in pairs]
                shown += f"; {sum(alike) / len(alike):.3f} of the kept tokens are the CPU's"
        recorder.figure(keys.of(name, keys.accuracy(budget)), round(right.value, 4), "", shown)
    recorder.check(
        keys.of(name, keys.COUNTS_EXACT), exact, f"{len(items)} questions at each budget"
    )
    if expected is not None:
        recorder.check(keys.of(name, keys.ACCURACY_AS_CPU), inside)
    return answers


def main() -> NoReturn:
    """Start the engine and ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--runner", type=int, choices=(1, 2), required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--stock", action="store_true", help="vLLM without the plugin")
    parser.add_argument("--chunks", action="store_true", help=f"steps of {CHUNK} tokens")
    parser.add_argument("--questions", type=int, help="how many")
    asked = parser.parse_args()
    os.environ["VLLM_PLUGINS"] = "" if asked.stock else "flashvlm"

    import torch

    arguments = {
        "dtype": asked.dtype,
        "enforce_eager": asked.eager,
        **engine_arguments(0.5, on_gpu=torch.cuda.is_available()),
    }
    if asked.chunks:
        arguments["max_num_batched_tokens"] = CHUNK
    how = f"{arguments['dtype']}, {'eager' if arguments['enforce_eager'] else 'compiled, graphs'}"
    recorder = Recorder(asked.name, how)
    items = questions(asked.questions or (KEPT if asked.chunks else QUESTIONS))
    engine = SmallVLM(items, scratch() / f"trace-{asked.name}", **arguments)
    left: dict[str, Any] = {"dtype": f"torch.{arguments['dtype']}", "chunk": CHUNK}
    with recorder.part("runner and backend"):
        describe(recorder, engine, asked.name, asked.runner, asked.stock)
    if not asked.chunks:
        with recorder.part("one at a time"):
            left["alone"] = ask_alone(engine, min(ALONE, len(items)))
    if not asked.stock:
        with recorder.part("accuracy"):
            left["answers"] = measure_accuracy(recorder, engine, asked.name)
        with recorder.part("mixed budgets"):
            exact, total = ask_mixed(engine, min(16, len(items)))
            seen = f"{exact} of {total}: none, 128, 64, 32, 16 and a quarter"
            recorder.check(keys.of(asked.name, keys.MIXED_EXACT), exact == total, seen)
        with recorder.part("prefix cache"):
            recorder.check(keys.of(asked.name, keys.PREFIX_CACHE), *two_questions(engine))
    answers_file(scratch(), asked.name).write_text(json.dumps(left) + "\n")
    leave(engine.llm, recorder.finish())


if __name__ == "__main__":
    main()
