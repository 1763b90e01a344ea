# SPDX-License-Identifier: Apache-2.0
"""Published alternatives to FlashVLM's selection, and two unpublished ones, for comparisons.

All of them select between vision tower and language model, from one image (or crop), in plain
torch, and return exactly the requested number of tokens. `visionzip` and `prumerge_plus` merge
tokens and return features, the others return indices. Each is written from the published
description of its method.
"""

from flashvlm_vllm.selection.baselines.cdpruner import cdpruner
from flashvlm_vllm.selection.baselines.divprune import divprune
from flashvlm_vllm.selection.baselines.inside import fastv_boundary, sparsevlm_boundary
from flashvlm_vllm.selection.baselines.prumerge import prumerge_anchors, prumerge_plus
from flashvlm_vllm.selection.baselines.sampling import random_tokens, uniform
from flashvlm_vllm.selection.baselines.visionzip import visionzip, visionzip_anchors
from flashvlm_vllm.selection.baselines.vispruner import vispruner

__all__ = [
    "cdpruner",
    "divprune",
    "fastv_boundary",
    "prumerge_anchors",
    "prumerge_plus",
    "random_tokens",
    "sparsevlm_boundary",
    "uniform",
    "visionzip",
    "visionzip_anchors",
    "vispruner",
]
