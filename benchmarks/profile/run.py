# SPDX-License-Identifier: Apache-2.0
"""Parts of the time of one request.

One client, one request at a time, an engine in this process. Run from the repository root:
``python -m benchmarks.profile.run``.
"""

import argparse
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.command import publish
from benchmarks.measuring.folders import MODELS, committed
from benchmarks.measuring.in_process import ENVIRONMENT
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import machine, say
from benchmarks.profile.figures import ROWS, limit, report
from testing.tiny.llava import build_llava

OUTPUT_TOKENS: Final = 16
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
            for row in mine:  # in turn, so that a machine that slows down affects all rows alike
                number += 1
                if row.is_second:
                    ask("What is on the table?", number, row.budget)
                stages, outputs = watch.request(
                    partial(ask, "What is left of the table?", number, row.budget)
                )
                if image:  # The first is a warm-up.
                    tokens = float(len(outputs[0].prompt_token_ids))
                    rows[row.name].append({**stages, "prompt_tokens": tokens})
        llm.llm_engine.engine_core.shutdown()
    return {
        name: {stage: statistics.median(each[stage] for each in found) for stage in found[0]}
        for name, found in rows.items()
    }


def main() -> None:
    """Measure; write results and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12, help="requests per row")
    parser.add_argument("--quick", action="store_true", help="a smoke run with a tiny model")
    parser.add_argument("--output", type=Path, default=committed("profile"), help="folder")
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    shape = QUICK_MODEL if arguments.quick else MODEL
    at = machine()
    name = "x".join(str(size) for size in shape.values())
    model = build_llava(MODELS / f"profile-llava-{name}", **shape)
    rows = measure(model, arguments.images)

    found, proportional = limit(rows)
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
    publish(arguments.output, settings, figures, [], report(rows), check=False)


if __name__ == "__main__":
    main()
