# SPDX-License-Identifier: Apache-2.0
"""Input processor: the gaps of a prompt are fitted into the model's positions."""

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
        "It is where a processed prompt and the longest answer allowed first meet, on every "
        "endpoint and offline; both together must fit into the rotary table.",
        "0.32",
        "A multimodal processor gets the sampling parameters.",
        wrapper=_process_inputs,
    ),
)
