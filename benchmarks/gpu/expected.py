# SPDX-License-Identifier: Apache-2.0
"""Write the small VLM's answers on a CPU in float32: ``python -m benchmarks.gpu.expected``.

A GPU's answers are held against it. To be written again when the small VLM changes, or what is
kept, or where it stands; the rehearsal fails until it is.
"""

from __future__ import annotations

import json
import os

from benchmarks.gpu.engines import CPU
from benchmarks.gpu.offline import leave
from benchmarks.gpu.recorder import scratch
from benchmarks.gpu.steps.engine import (
    BUDGETS,
    EXPECTED,
    KEPT,
    QUESTIONS,
    SEED,
    SmallVLM,
    ask_all,
    questions,
)


def main() -> None:
    """Ask every question at every budget."""
    os.environ |= {"VLLM_PLUGINS": "flashvlm", "VLLM_CPU_KVCACHE_SPACE": "1"}
    engine = SmallVLM(questions(QUESTIONS), scratch() / "trace-expected", **CPU)
    answers, kept = {}, {}
    for budget in BUDGETS:
        answers[str(budget)], _, all_kept = ask_all(engine, budget)
        if budget is not None:
            kept[str(budget)] = all_kept[:KEPT]
    found = {"seed": SEED, "answers": answers, "kept": kept}
    EXPECTED.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    leave(engine.llm, 0)


if __name__ == "__main__":
    main()
