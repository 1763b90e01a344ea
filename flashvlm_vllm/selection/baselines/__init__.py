# SPDX-License-Identifier: Apache-2.0
"""Published alternatives to FlashVLM's selection, and two that need no paper, for comparisons.

All work between vision tower and language model, on one image (or crop), in plain torch, and
return exactly as many tokens as asked for. The first five choose indices; the last two merge
tokens and so return features. Each is written from the published description of its method.
"""

from flashvlm_vllm.selection.baselines.cdpruner import cdpruner
from flashvlm_vllm.selection.baselines.divprune import divprune
from flashvlm_vllm.selection.baselines.prumerge import prumerge_anchors, prumerge_plus
from flashvlm_vllm.selection.baselines.sampling import random_tokens, uniform
from flashvlm_vllm.selection.baselines.visionzip import visionzip, visionzip_anchors
from flashvlm_vllm.selection.baselines.vispruner import vispruner

__all__ = [
    "cdpruner",
    "divprune",
    "prumerge_anchors",
    "prumerge_plus",
    "random_tokens",
    "uniform",
    "visionzip",
    "visionzip_anchors",
    "vispruner",
]
