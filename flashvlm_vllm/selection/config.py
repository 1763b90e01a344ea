# SPDX-License-Identifier: Apache-2.0
"""Every constant of the FlashVLM selection, with its source, and the six published ablations.

The paper (arXiv 2512.20561) gives few numbers; for others the value is that of the authors'
released LLaVA code. "Section" and "eq" below refer to the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

QueryGate = Literal["scaled", "normalized_last", "normalized_first", "none"]
Fusion = Literal["log", "linear"]
Schedule = Literal["fixed", "geometric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """Parameters of a selection. The defaults are the published method.

    Raises:
        ValueError: a field is outside its range; the message names field, value and range.
    """

    text_weight: float = 0.5
    """Weight of the text in the fusion, eta of eq 7, in [0, 1]. Released code."""

    aggregation_temperature: float = 0.05
    """Softmax temperature over the text tokens, tau of eq 5. Released code."""

    sharpening: bool = True
    """False skips all of "contrastive sharpening" in section 3.1: low-temperature softmax, power
    and the gate of eq 6. The aggregated similarity is then only min-max normalised."""

    sharpening_temperature: float = 0.01
    """Softmax temperature over the visual tokens. Released code."""

    sharpening_power: float = 2.5
    """Exponent of the power-law step. Released code."""

    gate_fraction: float = 0.005
    """Share of the visual tokens that eq 6 does not attenuate (its 0.995 quantile), in [0, 1].
    Released code; an outdated comment there says 10 %."""

    attenuation: float = 0.1
    """Factor on the visual tokens below the gate of eq 6, in [0, 1]; 1 switches the gate off.
    Released code."""

    query_gate: QueryGate = "scaled"
    """How the norm gate of eq 3 enters a text token's vector. The sources disagree:

    * ``scaled`` unit vector times the gate of the raw norms; the only order with an effect
      (released Qwen code, and what the text of section 3.1 says the gate is for);
    * ``normalized_last`` gate, then normalise, as section 3.1 is worded: the gate cancels;
    * ``normalized_first`` normalise, then gate by the norm of unit vectors, which is 1 (released
      LLaVA code);
    * ``none`` no gate: the ablation "w/o Query Gating"."""

    fusion: Fusion = "log"
    """``log``: weighted geometric mean (eq 7). ``linear``: weighted sum (section 4.5)."""

    important_fraction: float = 0.5
    """Share of the budget that goes to the best scores, in [0, 1]; the rest is the diversity
    reserve. "Balanced" in section 3.2, one half in the released code."""

    removed_per_round: int = 8
    """Tokens that one round of Algorithm 1 deletes with the schedule ``fixed``, at least 1.
    Released code."""

    schedule: Schedule = "fixed"
    """How many tokens a round of Algorithm 1 deletes. The paper and its code disagree:

    * ``fixed`` `removed_per_round`, so the number of rounds grows with N and the work with N^3
      (released code); all pairs of tokens are compared at once, N x N numbers;
    * ``geometric`` a fixed share of the remaining tokens, as in the complexity analysis of the
      paper's sections 6 and 7, in blocks of bounded length: time and memory grow with N. For
      video."""

    removed_fraction: float = 0.25
    """Share of the list that a round of the schedule ``geometric`` deletes, above 0 and at most
    0.5, because a round compares only half of the tokens. Our choice; the paper gives no value."""

    block_length: int = 512
    """Length of the longest block that a round of the schedule ``geometric`` compares, at least 4.
    Our choice."""

    epsilon: float = 1e-6
    """Keeps the divisions of eq 1, 3 and 6 finite, and is the lower bound in the logarithms of
    eq 7, in (0, 1). An example in section 3.1, this value in the released code."""

    def __post_init__(self) -> None:
        for share in ("text_weight", "gate_fraction", "attenuation", "important_fraction"):
            value = getattr(self, share)
            if not _is_number(value) or not 0 <= value <= 1:
                _refuse(share, value, "a number in [0, 1]")
        for positive in ("aggregation_temperature", "sharpening_temperature", "sharpening_power"):
            value = getattr(self, positive)
            if not _is_number(value) or value <= 0:
                _refuse(positive, value, "a finite number above 0")
        if not _is_number(self.epsilon) or not 0 < self.epsilon < 1:
            _refuse("epsilon", self.epsilon, "a number in (0, 1)")
        if not isinstance(self.sharpening, bool):
            _refuse("sharpening", self.sharpening, "True or False")
        if self.query_gate not in get_args(QueryGate):
            _refuse("query_gate", self.query_gate, f"one of {', '.join(get_args(QueryGate))}")
        if self.fusion not in get_args(Fusion):
            _refuse("fusion", self.fusion, f"one of {', '.join(get_args(Fusion))}")
        if self.schedule not in get_args(Schedule):
            _refuse("schedule", self.schedule, f"one of {', '.join(get_args(Schedule))}")
        removed = self.removed_fraction
        if not _is_number(removed) or not 0 < removed <= 0.5:
            _refuse("removed_fraction", removed, "a number above 0 and at most 0.5")
        for count, least in (("removed_per_round", 1), ("block_length", 4)):
            value = getattr(self, count)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                _refuse(count, value, f"an integer of at least {least}")


def _is_number(value: object) -> bool:
    # bool is a subclass of int; a weight of True is a mistake, not 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(field: str, value: object, allowed: str) -> None:
    raise ValueError(f"SelectionConfig.{field} is {value!r}; allowed: {allowed}")


VIDEO: Final = SelectionConfig(schedule="geometric")
"""For inputs of thousands of tokens, selected as one list: time and memory linear in them."""

ABLATIONS: Final[Mapping[str, SelectionConfig]] = MappingProxyType(
    {
        "without_text_guidance": SelectionConfig(text_weight=0.0),
        # Most relevances are equal (at the lower bound), so after the few best the lowest indices
        # are kept.
        "without_visual_saliency": SelectionConfig(text_weight=1.0),
        "without_diversity_reserve": SelectionConfig(important_fraction=1.0),
        "linear_fusion": SelectionConfig(fusion="linear"),
        "without_text_sharpening": SelectionConfig(sharpening=False),
        "without_query_gating": SelectionConfig(query_gate="none"),
    }
)
"""The six settings of section 4.5 (Table 5), in the paper's order. Their code is not published, so
each follows our interpretation of its one-line description."""
