# SPDX-License-Identifier: Apache-2.0
"""Where does a request's time go, and what is left to gain?

One client, one request at a time, an engine in this process. Run from the repository root:
``python -m benchmarks.profile.run``.
"""

import argparse
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import machine, say, table, write
from testing.tiny.llava import VISUAL_TOKENS, build_llava

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
OUTPUT_TOKENS: Final = 16
BUDGET: Final = 64
CACHE_GB: Final = {"without": 0.0, "with": 0.25}
# The tower costs about a twentieth of the prefill, as in LLaVA-1.5-7B.
MODEL: Final[dict[str, Any]] = {
    "hidden": 1024,
    "layers": 12,
    "vision_hidden": 384,
    "vision_layers": 6,
}
QUICK_MODEL: Final[dict[str, Any]] = {
    "hidden": 256,
    "layers": 2,
    "vision_hidden": 128,
    "vision_layers": 4,
}


@dataclass(frozen=True)
class Row:
    """One kind of request."""

    name: str
    cache: str
    budget: int | None
    is_second: bool = False
    """Whether another question was asked about the image before."""


ROWS: Final = (
    Row("no budget", "without", None),
    Row(f"{BUDGET} tokens", "without", BUDGET),
    Row(f"{BUDGET} tokens, second question, before", "without", BUDGET, is_second=True),
    Row(f"{BUDGET} tokens, second question, now", "with", BUDGET, is_second=True),
)


def measure(model: Path, images: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each stage by row, and the prompt's tokens."""
    from vllm import LLM, SamplingParams

    from benchmarks.profile.stages import Stopwatch

    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    rows: dict[str, list[dict[str, float]]] = {row.name: [] for row in ROWS}
    for cache, size in CACHE_GB.items():
        say(f"starting an engine {cache} feature cache")
        llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            mm_processor_kwargs={"visual_feature_cache_gb": size},
        )
        watch = Stopwatch(llm)
        mine = [row for row in ROWS if row.cache == cache]

        def ask(question: str, number: int, budget: int | None, llm: Any = llm) -> Any:
            prompt = {
                "prompt": f"USER: <image>\n{question} ASSISTANT:",
                "multi_modal_data": {"image": picture(number)},
                "mm_processor_kwargs": {"visual_budget": budget},
            }
            return llm.generate(prompt, sampling, use_tqdm=False)

        number = 0
        for image in range(images + 1):
            for row in mine:  # in turn, so that a drifting machine is the same for all
                number += 1
                if row.is_second:
                    ask("What is on the table?", number, row.budget)
                stages, outputs = watch.request(
                    partial(ask, "What is left of the table?", number, row.budget)
                )
                if image:  # The first warms up.
                    tokens = float(len(outputs[0].prompt_token_ids))
                    rows[row.name].append({**stages, "prompt_tokens": tokens})
        llm.llm_engine.engine_core.shutdown()
    return {
        name: {stage: statistics.median(each[stage] for each in found) for stage in found[0]}
        for name, found in rows.items()
    }


def limit(rows: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return the prefill at the budget, and what it would be in proportion to its tokens, in ms."""
    whole, pruned = rows[ROWS[0].name], rows[ROWS[1].name]
    share = pruned["prompt_tokens"] / whole["prompt_tokens"]
    return pruned["prefill"], whole["prefill"] * share


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12, help="requests per row")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a try")
    parser.add_argument("--output", type=Path, default=HERE / "results.json", help="JSON file")
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "flashvlm",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    shape = QUICK_MODEL if arguments.quick else MODEL
    at = machine()
    name = "x".join(str(size) for size in shape.values())
    model = build_llava(ROOT / ".models" / f"profile-llava-{name}", **shape)
    rows = measure(model, arguments.images)

    stages = [name for name in rows[ROWS[0].name] if name != "prompt_tokens"]
    print(
        table(
            ("ms", "prompt tokens", *stages),
            [
                (name, f"{found['prompt_tokens']:.0f}", *(f"{found[each]:.1f}" for each in stages))
                for name, found in rows.items()
            ],
        )
    )
    found, proportional = limit(rows)
    print(
        f"\nPrefill at {BUDGET} of {VISUAL_TOKENS} tokens: {found:.1f} ms; in proportion to the "
        f"tokens it would be {proportional:.1f} ms."
    )
    settings = {
        "machine": at,
        "model": shape,
        "images": arguments.images,
        "output_tokens": OUTPUT_TOKENS,
    }
    figures = {
        "milliseconds": rows,
        "prefill_ms": {"measured": found, "proportional_to_tokens": proportional},
    }
    write(arguments.output, settings, figures, marks=[])


if __name__ == "__main__":
    main()
