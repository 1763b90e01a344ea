# SPDX-License-Identifier: Apache-2.0
"""One battery of guarantees over a model of the table, with and without the plugin.

``python -m testing.tiny.table.battery <architecture> <file>`` writes what an engine did, as JSON.
With ``VLLM_PLUGINS=flashvlm`` it asks with budgets, too; `verdict` compares the two files.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from testing.photo import photo
from testing.tiny.table.all import TABLE
from testing.tiny.table.entry import TinyModel
from testing.tiny.table.serve import FRAMES, engine_of

LONG = "Look at all of it, then say what it is. " * 70
"""A question longer than a step of the engine computes at once."""
AT_ONCE = 512
SELECTORS = ("flashvlm", "flashvlm-2", "divprune", "vispruner")


class Asked:
    """An engine of one model in this process, and what it computed."""

    def __init__(self, entry: TinyModel, **engine: Any) -> None:
        self.trace = Path(mkdtemp()) / "trace"
        self.trace.mkdir()
        os.environ["FLASHVLM_TRACE_DIR"] = str(self.trace)
        self.entry = entry
        limit = entry.engine.get("limit_mm_per_prompt", {}).get("image", 2)
        self.most = min(entry.most_images or 2, limit)
        settings = {"max_num_batched_tokens": AT_ONCE} | dict(entry.engine) | engine
        self.llm = engine_of(entry, **settings)
        self.image = photo("astronaut").resize(entry.size)
        self.other = photo("cat").resize(entry.size)

    @property
    def model(self) -> Any:
        """vLLM's model."""
        worker: Any = self.llm.llm_engine.model_executor.driver_worker
        return worker.worker.model_runner.model

    def request(
        self, budget: Any = None, images: int = 1, question: str = "What is it?", **own: Any
    ) -> Any:
        """Return a prompt for ``LLM.generate``."""
        return {
            **self.entry.request(question, [self.image, self.other][:images]),
            **_arguments(budget, own),
        }

    def video(self, budget: Any = None, **own: Any) -> Any:
        """Return a prompt with a video of four frames."""
        frames = [self.image.rotate(90 * turn) for turn in range(4)]
        return {
            "prompt": self.entry.prompt("What is it?", images=0, videos=1),
            "multi_modal_data": self.entry.clip(frames, FRAMES),
            **_arguments(budget, own),
        }

    def audio(self, budget: Any = None) -> Any:
        """Return a prompt with an image and a second of sound."""
        sound = np.sin(np.arange(16_000) / 9).astype(np.float32)
        return {
            "prompt": self.entry.prompt("What is it?", clips=1),
            "multi_modal_data": {**self.entry.data([self.image]), "audio": [(sound, 16_000)]},
            **_arguments(budget, {}),
        }

    def __call__(
        self, *requests: Any, fresh: bool = True, adapter: Any = None
    ) -> list[dict[str, Any]]:
        """Ask all requests at once; return tokens of prompt and answer, and what was cached.

        Args:
            requests: prompts for ``LLM.generate``.
            fresh: whether all caches are cleared before.
            adapter: vLLM's ``LoRARequest``, if any.

        """
        from vllm import SamplingParams

        if fresh:
            self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
            if hasattr(self.model, "clear_caches"):
                self.model.clear_caches()
        greedy = SamplingParams(temperature=0, max_tokens=6)
        return [
            {
                "prompt": len(each.prompt_token_ids),
                "answer": list(each.outputs[0].token_ids),
                "cached": each.num_cached_tokens,
            }
            for each in self.llm.generate(
                list(requests), greedy, use_tqdm=False, lora_request=adapter
            )
        ]

    def totals(self) -> list[tuple[int, list[int] | None]]:
        """Return tokens and kept tokens of all pruned items so far."""
        path = self.trace / "rank-0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(each["total"], each["kept"]) for each in map(json.loads, lines)]

    @contextmanager
    def positions(self) -> Iterator[list[list[list[int]]]]:
        """Collect the positions that rotary embeddings get inside the block, ``(axes, n)``."""
        seen: list[list[list[int]]] = []
        rotary = [
            each
            for each in self.model.get_language_model().modules()
            if "RotaryEmbedding" in type(each).__name__
        ]

        def hook(module: Any, inputs: Any, named: Any) -> None:
            positions = inputs[0] if inputs else named["positions"]
            step = positions.view(-1, positions.shape[-1]).tolist()
            if not seen or seen[-1] != step:  # Layers share the module.
                seen.append(step)

        handles = [each.register_forward_pre_hook(hook, with_kwargs=True) for each in rotary[:1]]
        try:
            yield seen
        finally:
            for each in handles:
                each.remove()


def _arguments(budget: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return a request's processor arguments, and nothing if there are none."""
    arguments = {f"visual_{name}": value for name, value in own.items()}
    if budget is not None:
        arguments["visual_budget"] = budget
    return {"mm_processor_kwargs": arguments} if arguments else {}


def record(architecture: str, *, is_pruning: bool) -> dict[str, Any]:
    """Run the battery's requests on one engine."""
    entry = TABLE[architecture]
    ask = Asked(entry)
    found: dict[str, Any] = {"most": ask.most, "chunks": entry.chunks}
    with ask.positions() as seen:
        (found["whole"],) = ask(ask.request())
    found["whole positions"] = of_prompt(seen, found["whole"])
    found["two"] = ask(ask.request(images=min(2, ask.most)))
    found["long"] = ask(ask.request(question=LONG))
    if entry.video:
        found["video"] = ask(ask.video())
    if entry.audio:
        found["audio"] = ask(ask.audio())
    if not is_pruning:
        return found
    with ask.positions() as seen:
        (found["half"],) = ask(ask.request(0.5))
    found["half positions"] = of_prompt(seen, found["half"])
    found["items"] = ask.totals()
    found["again"] = ask(ask.request(0.5), fresh=False)
    (total, _), *_ = ask.totals() or [(0, None)]
    found["number"] = ask(ask.request(max(1, total // 3)))
    found["all"] = ask(ask.request(total))
    found["closed"] = ask(ask.request(0.5, positions="closed"))
    long = [ask.request(0.5, question=LONG)]
    found["long half"], found["long again"] = ask(*long), ask(*long, fresh=False)
    mixed = [
        ask.request(0.5),
        ask.request(),
        ask.request(0.25, question="Why?"),
        ask.request(0.5, images=min(2, ask.most)),
        *[ask.request(0.3, selector=name) for name in SELECTORS],
    ]
    for name, batches in (("alone", [[each] for each in mixed]), ("mixed", [mixed])):
        before = len(ask.totals())
        found[name] = [answer for batch in batches for answer in ask(*batch)]
        found[f"{name} items"] = ask.totals()[before:]
    if entry.video:
        before = len(ask.totals())
        found["video half"] = ask(ask.video(0.5))
        found["video items"] = ask.totals()[before:]
    if entry.audio:
        with ask.positions() as seen:
            found["audio whole"] = ask(ask.audio())
        with ask.positions() as pruned:
            found["audio half"] = ask(ask.audio(0.5))
        found["audio positions"] = [
            of_prompt(seen, found["audio whole"][0]),
            of_prompt(pruned, found["audio half"][0]),
        ]
    found["axes"] = ask.model.axes
    last = getattr(ask.model, "_last_attention", None)
    found["saliency"] = None if last is None else last.was_mapped
    return found


def of_prompt(steps: list[list[list[int]]], asked: dict[str, Any]) -> list[list[int]]:
    """Return the positions of a prompt, ``(axes, n)``, which may take several steps."""
    if not steps:
        return []
    rows = [[each for step in steps for each in step[axis]] for axis in range(len(steps[0]))]
    return [row[: asked["prompt"]] for row in rows]


def main() -> int:
    """Write what one engine did."""
    architecture, path = sys.argv[1:3]
    is_pruning = "flashvlm" in os.environ.get("VLLM_PLUGINS", "")
    Path(path).write_text(json.dumps(record(architecture, is_pruning=is_pruning)))
    return 0


def verdict(stock: dict[str, Any], pruned: dict[str, Any]) -> dict[str, bool]:
    """Return which guarantees hold, by name.

    Args:
        stock: what the engine without the plugin did.
        pruned: what the engine with the plugin did.

    """
    others = [name for name in ("video", "audio") if name in stock]
    same = ["whole", "two", "long", "whole positions", *others]
    whole, half = pruned["whole"], pruned["half"]
    total, kept = pruned["items"][0]
    dropped = total - (len(kept) if kept is not None else 0)
    number = pruned["number"][0]
    holds = {
        "without a budget as stock": all(stock[name] == pruned[name] for name in same),
        "counts": whole["prompt"] - half["prompt"] == dropped == total - -(-total // 2)
        or whole["prompt"] - half["prompt"] == dropped == total - total // 2,
        "a number": whole["prompt"] - number["prompt"] == total - max(1, total // 3),
        "all tokens": pruned["all"][0]["answer"] == whole["answer"],
        "several images": pruned["alone"][3]["prompt"] < pruned["two"][0]["prompt"],
        "mixed budgets": _are_the_same(pruned["alone"], pruned["mixed"]),
        "mixed selections": _kept(pruned["alone items"]) == _kept(pruned["mixed items"]),
        "prefix cache": pruned["again"][0]["answer"] == half["answer"],
        "chunks": _answers(pruned["long half"]) == _answers(pruned["long again"]),
        "closed": pruned["closed"][0]["prompt"] == half["prompt"],
        # A model without rotary embeddings has no places to keep.
        "places": not pruned["axes"] or _keeps_places(pruned, kept),
    }
    if "video" in pruned:
        video = sum(each - len(kept or ()) for each, kept in pruned["video items"])
        lost = pruned["video"][0]["prompt"] - pruned["video half"][0]["prompt"]
        holds["video"] = 0 < lost == video
    if "audio" in pruned:
        lost = pruned["audio"][0]["prompt"] - pruned["audio half"][0]["prompt"]
        holds["audio"] = lost == dropped and _are_in_order(*pruned["audio positions"])
    return holds


def _are_the_same(alone: list[dict[str, Any]], mixed: list[dict[str, Any]]) -> bool:
    """Return whether prompts, and answers where the model's do not depend on the batch, are equal.

    The second request has no budget. Rounding differs with the batch, and in a tiny mixture of
    experts it decides between experts.
    """
    if alone[1]["answer"] == mixed[1]["answer"]:
        return _answers(alone) == _answers(mixed)
    return [each["prompt"] for each in alone] == [each["prompt"] for each in mixed]


def _kept(items: list[tuple[int, list[int] | None]]) -> set[str]:
    # Equal items of one batch are selected once.
    return {str(kept) for _, kept in items}


def _answers(every: list[dict[str, Any]]) -> list[Any]:
    return [(each["prompt"], each["answer"]) for each in every]


def _keeps_places(pruned: dict[str, Any], kept: list[int] | None) -> bool:
    """Return whether the pruned prompt has the positions of its tokens in the whole prompt."""
    if not pruned["whole positions"] or kept is None:
        return False
    return _are_in_order(pruned["whole positions"], pruned["half positions"])


def _are_in_order(whole: list[list[int]], half: list[list[int]]) -> bool:
    """Return whether a pruned prompt's positions are some of the whole one's, in order."""
    every = list(zip(*whole, strict=True))
    stays = list(zip(*half, strict=True))
    # The rest of the prompt is in order: dropping the others must give what is left.
    place = iter(every)
    in_order = all(any(each == other for other in place) for each in stays)
    return every[-1] == stays[-1] and every[0] == stays[0] and in_order


if __name__ == "__main__":
    sys.exit(main())
