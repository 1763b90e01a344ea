# SPDX-License-Identifier: Apache-2.0
"""One engine on a tiny Qwen2.5-VL whose vision encoder has CUDA graphs, or is compiled.

``python -m benchmarks.gpu.steps.encoder --name NAME``; with ``--compiled`` the encoder is compiled
and has no graphs; with ``--stock`` vLLM without the plugin, to be compared with. (vLLM has neither
for the small VLM of the other steps.)
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, Final, NoReturn

from benchmarks.gpu import keys
from benchmarks.gpu.comparing import answers_file
from benchmarks.gpu.engines import engine_arguments
from benchmarks.gpu.offline import leave
from benchmarks.gpu.recorder import Recorder, scratch
from testing.photo import photo
from testing.recorded_graph import capture_encoder, graph_hits
from testing.tiny.qwen_vl import END, IMAGE, START, build_qwen_vl

SIZES: Final = ((200, 190), (170, 190), (120, 220), (220, 90), (100, 100), (190, 200))
"""Width and height of each image, in pixels; a question about each is sent alone."""
BUDGETS: Final = (4, 0.5)


class TinyQwen:
    """An offline engine."""

    def __init__(self, name: str, **arguments: Any) -> None:
        """Start the engine.

        Args:
            name: of the step.
            arguments: of vLLM's ``LLM``.

        """
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the worker
        from vllm import LLM

        path = build_qwen_vl(scratch() / f"{name}.model", "2.5")
        self.llm = LLM(model=str(path), max_model_len=1024, max_num_seqs=8, **arguments)

    def ask(self, number: int, budget: object = None) -> Any:
        """Ask about an image, with empty caches; return vLLM's output."""
        from vllm import SamplingParams

        assert self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        request: Any = {
            "prompt": f"USER: {START}{IMAGE}{END}what color is the suit?",
            "multi_modal_data": {"image": photo("astronaut").resize(SIZES[number])},
            **({} if budget is None else {"mm_processor_kwargs": {"visual_budget": budget}}),
        }
        sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
        (output,) = self.llm.generate([request], sampling, use_tqdm=False)
        return output

    def call(self, function: Any) -> Any:
        """Call a function in the worker."""
        (result,) = self.llm.collective_rpc(function)
        return result


def answer_of(output: Any) -> dict[str, Any]:
    """Return ids and log-probabilities as the steps are compared by."""
    answer = output.outputs[0]
    chosen = zip(answer.logprobs, answer.token_ids, strict=True)
    logprobs = [place[token].logprob for place, token in chosen]
    return {"ids": list(answer.token_ids), "logprobs": logprobs}


def count_layers(worker: Any) -> None:
    """Run in the worker: count the calls of a layer; compiled code does not call its hook."""
    layer = worker.get_model().visual.blocks[0].attn
    worker.counted = []
    layer.register_forward_pre_hook(lambda *_: worker.counted.append(1))


def counted(worker: Any) -> int:
    """Run in the worker: return the counted calls."""
    return len(worker.counted)


def main() -> NoReturn:
    """Start the engine and ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--compiled", action="store_true", help="compiled, without graphs")
    parser.add_argument("--stock", action="store_true", help="vLLM without the plugin")
    asked = parser.parse_args()
    os.environ["VLLM_PLUGINS"] = "" if asked.stock else "flashvlm"

    import torch

    on_gpu = torch.cuda.is_available()
    arguments = {"dtype": "bfloat16", **engine_arguments(0.5, on_gpu=on_gpu)}
    setting = "compile_mm_encoder" if asked.compiled else "cudagraph_mm_encoder"
    arguments["compilation_config"] = {**arguments.get("compilation_config", {}), setting: True}
    recorder = Recorder(asked.name, f"{arguments['dtype']}, {setting}")
    engine = TinyQwen(asked.name, **arguments)
    if not on_gpu and not asked.compiled:
        engine.call(capture_encoder)
    numbers = range(len(SIZES))
    with recorder.part("without a budget"):
        alone = [answer_of(engine.ask(number)) for number in numbers]
        left = {"dtype": f"torch.{arguments['dtype']}", "alone": alone}
        answers_file(scratch(), asked.name).write_text(json.dumps(left) + "\n")
    if not asked.stock:
        with recorder.part("how items are encoded"):
            if asked.compiled:
                engine.call(count_layers)
            record_counts(recorder, engine, asked.name, is_compiled=asked.compiled)
    leave(engine.llm, recorder.finish())


def record_counts(recorder: Recorder, engine: TinyQwen, name: str, *, is_compiled: bool) -> None:
    """Count uses of a graph, or calls in Python of a compiled layer, without and with budgets."""
    count = counted if is_compiled else graph_hits
    unit = "calls in Python" if is_compiled else "items encoded with a graph"
    counts, lengths = [], []
    for budgets in ((None,), BUDGETS):
        before = engine.call(count)
        outputs = [engine.ask(number, each) for each in budgets for number in range(len(SIZES))]
        counts.append((engine.call(count) - before, len(outputs)))
        lengths.append([len(output.prompt_token_ids) for output in outputs])
    (whole, all_whole), (pruned, all_pruned) = counts
    wanted = (0, all_pruned) if is_compiled else (all_whole, 0)
    seen = f"{whole} {unit}, {all_whole} requests"
    recorder.check(keys.of(name, keys.WHOLE_ENCODED), whole == wanted[0], seen)
    shorter = all(a < b for a, b in zip(lengths[1], lengths[0] * len(BUDGETS), strict=True))
    seen = f"{pruned} {unit}, {all_pruned} requests; prompts are shorter: {shorter}"
    recorder.check(keys.of(name, keys.PRUNED_ENCODED), pruned == wanted[1] and shorter, seen)


if __name__ == "__main__":
    main()
