# SPDX-License-Identifier: Apache-2.0
"""One request at a time on an engine in this process: its latency, and the GPU memory it takes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.engines import engine_arguments


@dataclass(frozen=True)
class First:
    """A first token."""

    whole: float
    """Seconds from the request to its answer: preprocessing, the engine, and the way between."""
    scheduled: float
    """Seconds from the engine's first step on it to its token: tower, selection and prefill."""
    prompt_tokens: int
    peak_bytes: int
    """Most GPU memory of tensors at once, the whole KV cache included; 0 without a GPU."""


def reset_peak(worker: Any) -> None:
    """Run in the worker: reset the peak of allocated memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(worker: Any) -> int:
    """Run in the worker: the most bytes of tensors since `reset_peak`."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


class OneAtATime:
    """An offline engine with the plugin."""

    def __init__(self, model: Path, kv_gib: float, *, on_gpu: bool, **arguments: Any) -> None:
        """Start it.

        Args:
            model: its folder.
            kv_gib: KV cache on a GPU.
            on_gpu: whether there is one.
            arguments: of vLLM's ``LLM``.

        """
        os.environ["VLLM_PLUGINS"] = "flashvlm"
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `peak_bytes` is sent to the worker
        from vllm import LLM

        self.llm = LLM(
            **{
                "model": str(model),
                "max_num_seqs": 4,
                "disable_log_stats": False,  # its times are in the request's metrics
                "enable_prefix_caching": False,
                **engine_arguments(kv_gib, on_gpu=on_gpu),
                **arguments,
            }
        )

    def first(self, prompt: str, data: Mapping[str, Any], budget: object) -> First:
        """Get one token."""
        from vllm import SamplingParams

        own = {} if budget is None else {"visual_budget": budget}
        request: Any = {
            "prompt": prompt,
            "multi_modal_data": dict(data),
            "mm_processor_kwargs": own,
        }
        self.llm.collective_rpc(reset_peak)
        settings = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        begun = time.perf_counter()
        (output,) = self.llm.generate([request], settings, use_tqdm=False)
        whole = time.perf_counter() - begun
        times: Any = output.metrics  # `disable_log_stats` is False, so there are some
        scheduled = float(times.first_token_ts - times.scheduled_ts)
        (peak,) = self.llm.collective_rpc(peak_bytes)
        return First(whole, scheduled, len(output.prompt_token_ids or ()), peak)

    def kv_cache_bytes(self) -> int:
        """Return the bytes of the whole KV cache."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return int(cache.kv_cache_memory_bytes or 0)

    def dtype(self) -> str:
        """Return the type of weights and activations, such as ``float16``."""
        return str(self.llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")


def leave(llm: Any, code: int) -> NoReturn:
    """End an offline engine's processes and this one, with an exit status."""
    sys.stdout.flush()
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        os._exit(code)  # an engine that hangs at its end must not cost the step its limit
