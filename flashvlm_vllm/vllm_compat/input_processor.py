# SPDX-License-Identifier: Apache-2.0
"""Wraps vLLM's input processor: fits the gaps of a prompt into the rotary table."""

from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap


def _process_inputs(
    original: Any, processor: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.processing.fitting import fit

    request = original(processor, request_id, prompt, *args, **kwargs)
    fit(request, processor.model_config, prompt)
    return request


WRAPS: Final = (
    Wrap(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "It is the first function that gets both the processed prompt and the length of the "
        "longest answer, on every endpoint and offline; both must fit into the rotary table.",
        "0.32",
        "Multimodal processors get the sampling parameters.",
        wrapper=_process_inputs,
    ),
)
