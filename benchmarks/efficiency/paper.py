# SPDX-License-Identifier: Apache-2.0
"""The paper's efficiency table (its Table 4; LLaVA-NeXT-7B, one A100, FP16, batch size 1)."""

from dataclasses import dataclass
from typing import Final

UNPRUNED: Final = "unpruned"
FULL_TOKENS: Final = 2880
BUDGETS: Final = (640, 160)


@dataclass(frozen=True)
class Row:
    """As printed."""

    tflops: float
    kv_mb: float
    memory_gb: float
    latency_ms: float


ROWS: Final = {
    (UNPRUNED, 2880): Row(43.6, 1440, 17.0, 313),
    ("fastv", 640): Row(13.5, 380, 16.9, 148),
    ("vispruner", 640): Row(11.5, 360, 14.8, 117),
    ("flashvlm", 640): Row(11.3, 356, 14.6, 115),
    ("fastv", 160): Row(6.3, 95, 16.9, 112),
    ("vispruner", 160): Row(3.8, 80, 14.7, 78),
    ("flashvlm", 160): Row(3.6, 78, 14.7, 74),
}


def latency_share(method: str, tokens: int) -> float:
    """Return the latency relative to the unpruned model."""
    return ROWS[method, tokens].latency_ms / ROWS[UNPRUNED, FULL_TOKENS].latency_ms
