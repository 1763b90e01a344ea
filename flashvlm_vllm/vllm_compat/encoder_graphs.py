# SPDX-License-Identifier: Apache-2.0
"""Lets items with a budget bypass the CUDA graphs of the vision encoder.

vLLM puts items into one call only if they have the same model inputs, so all items of a call have
a budget or none has.
"""

from collections.abc import Callable
from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap


def execute(original: Callable[..., Any], graphs: Any, mm_kwargs: dict[str, Any]) -> Any:
    """Encode items without a budget with CUDA graphs.

    Args:
        original: vLLM's method.
        graphs: the CUDA graphs of the encoder.
        mm_kwargs: model inputs of the items.

    Returns:
        The embeddings of each item. ``None`` for items with a budget: both model runners then call
        the model's ``embed_multimodal``.

    """
    from flashvlm_vllm.ipc.item_fields import pruned_modality
    from flashvlm_vllm.worker.pruned_model import PrunedModel

    model = graphs.model
    if not isinstance(model, PrunedModel):
        return original(graphs, mm_kwargs)
    if pruned_modality(mm_kwargs) is not None:
        return None
    return model.finish_whole(mm_kwargs, original(graphs, mm_kwargs))


WRAPS: Final = (
    Wrap(
        "vllm.v1.worker.encoder_cudagraph:EncoderCudaGraphManager.execute",
        "The runners call it in place of embed_multimodal, and it returns all tokens of an item, "
        "without position channels. Items with a budget are encoded without a graph; the others "
        "get the same position channels as without one.",
        "0.32",
        "Encoder graphs let the model select tokens.",
        "https://github.com/vllm-project/vllm/pull/49852",
        wrapper=execute,
    ),
)
