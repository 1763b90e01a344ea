# SPDX-License-Identifier: Apache-2.0
"""Cost of the plugin's positions on the first model runner at 64 sequences.

With the plugin a model with ordinary rotary embeddings has M-RoPE positions, with and without a
budget. vLLM's first runner computes those request by request in Python
(``_calc_mrope_positions``), where it otherwise adds two arrays. The second runner has a kernel.
The loop and the whole step are timed inside a running engine. Run from the repository root:
``python -m benchmarks.idle.positions``.
"""

import json
import os
import statistics
import time
from typing import Any, Final

from benchmarks.measuring.folders import MODELS, committed
from benchmarks.measuring.in_process import ENVIRONMENT
from testing.tiny.llava import build_llava

SEQUENCES: Final = 64
ANSWER_TOKENS: Final = 128
OUTPUT: Final = committed("idle") / "positions.json"


class Timed:
    """A method that records the time of each call."""

    def __init__(self, owner: Any, name: str) -> None:
        self._call = getattr(owner, name)
        self.microseconds: list[float] = []
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        begun = time.perf_counter()
        result = self._call(*args, **kwargs)
        self.microseconds.append(1e6 * (time.perf_counter() - begun))
        return result


def main() -> None:
    """Measure; write and print the result."""
    os.environ |= ENVIRONMENT
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(build_llava(MODELS / "llava-clip")),
        dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=SEQUENCES,
    )  # fmt: skip
    client: Any = llm.llm_engine.engine_core  # the engine itself is in this process
    runner = client.engine_core.model_executor.driver_worker.worker.model_runner
    assert runner.uses_mrope
    loop, step = Timed(runner, "_calc_mrope_positions"), Timed(runner, "execute_model")
    settings = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    llm.generate([f"USER: {n}? ASSISTANT:" for n in range(SEQUENCES)], settings, use_tqdm=False)
    # The last half: all sequences decode.
    loops, steps = (each.microseconds[-ANSWER_TOKENS // 2 :] for each in (loop, step))
    found = {
        "sequences": SEQUENCES,
        "steps": len(steps),
        "loop_us": round(statistics.median(loops), 1),
        "step_us": round(statistics.median(steps), 1),
    }
    found["share"] = round(found["loop_us"] / found["step_us"], 4)
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
