# SPDX-License-Identifier: Apache-2.0
"""Features and saliency of CLIP and SigLIP towers, computed in one pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.vision import (
    get_num_selected_vision_tokens,
    get_vision_encoder_info,
)

from flashvlm_vllm.vision.attention import cls_attention, received_attention
from flashvlm_vllm.vision.tap import AttentionTap


@dataclass(frozen=True)
class Encoded:
    """Output of a tower for a batch of ``B`` images or crops with ``N`` tokens."""

    features: Tensor
    """``(B, N, C)``."""
    saliency: Tensor
    """``(B, N)`` float32."""
    keys: Tensor | None
    """``(B, N, H, d)`` attention keys, if requested."""


class SalientTower:
    """A CLIP or SigLIP tower that also returns how much attention each token received.

    The attention is that of the last layer that vLLM builds, whose output are the features: with
    ``vision_feature_layer = -2`` the tower ends at layer -2.
    """

    def __init__(self, tower: Any, config: Any) -> None:
        """Attach to ``tower``, vLLM's CLIP or SigLIP model.

        Args:
            tower: the vision tower.
            config: configuration of the LLaVA model that it belongs to.

        """
        attention = tower.vision_model.encoder.layers[-1].self_attn.attn
        self._tap = AttentionTap(attention, config.vision_config.num_attention_heads)
        self._has_cls = isinstance(tower, CLIPVisionModel)

        size = get_vision_encoder_info(config).get_image_size()
        positions = get_vision_encoder_info(config).get_num_image_tokens(
            image_width=size, image_height=size
        )
        self.tokens = get_num_selected_vision_tokens(
            positions, getattr(config, "vision_feature_select_strategy", "full")
        )
        """Number of feature tokens per image or crop."""
        self._first = positions - self.tokens

    def run(
        self, encode: Callable[[Tensor], Any], pixel_values: Tensor, *, with_keys: bool = False
    ) -> Encoded:
        """Encode images or crops.

        Args:
            encode: runs the tower on pixels and returns its features.
            pixel_values: ``(B, 3, H, W)`` in the tower's input size.
            with_keys: whether to return the attention keys too.

        Returns:
            Features, and as saliency the mean over heads of the CLS token's attention (CLIP) or of
            the attention received from all tokens (SigLIP).

        """
        attend = cls_attention if self._has_cls else received_attention

        def read(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
            own = key[:, self._first :].contiguous() if with_keys else None
            return attend(query, key, self._tap.scale), own

        with self._tap.listen(read) as captured:
            features: Tensor = encode(pixel_values)
        saliency = torch.cat([attended for attended, _ in captured])
        keys = [own for _, own in captured if own is not None]
        return Encoded(
            features,
            self._tap.mean_over_heads(saliency)[:, self._first :],
            self._tap.of_all_heads(torch.cat(keys), dim=2) if keys else None,
        )
