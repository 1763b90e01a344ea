# SPDX-License-Identifier: Apache-2.0
"""Which positions kept tokens have: ``kept`` as without pruning, or ``closed`` up."""

from enum import StrEnum
from typing import Any

VISUAL_POSITIONS = "visual_positions"
"""The name under which requests, flags and processor arguments carry it."""


class VisualPositions(StrEnum):
    """Where the tokens of a pruned prompt stand."""

    KEPT = "kept"
    """Where they stand without pruning: what is dropped leaves a gap."""
    CLOSED = "closed"
    """One after another, as in the released LLaVA code."""


ALLOWED = " or ".join(repr(str(each)) for each in VisualPositions)


def parse_positions(value: object) -> VisualPositions | None:
    """Check what a request, a flag or a processor argument says.

    Args:
        value: ``None`` (the default applies) or one of the two names.

    Raises:
        ValueError: the value is neither; the message names the two.

    """
    if value is None:
        return None
    if isinstance(value, str) and value in tuple(VisualPositions):
        return VisualPositions(value)
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise ValueError(f"visual positions are {ALLOWED}; got {shown}")


_AXES = "_flashvlm_position_axes"


def position_axes(model_config: Any) -> int:
    """Count the axes of the positions that kept tokens keep; 0 where they close up.

    Args:
        model_config: vLLM's, of an engine or of one of its workers.

    """
    return axes_on(model_config.multimodal_config)


def axes_on(multimodal_config: Any) -> int:
    """Return `position_axes` of the model whose multimodal configuration this is."""
    axes: int = getattr(multimodal_config, _AXES, 0)
    return axes


def set_position_axes(model_config: Any, axes: int) -> None:
    """Say that kept tokens keep their places; workers get it with vLLM's configuration."""
    setattr(model_config.multimodal_config, _AXES, axes)


def default_positions(model_config: Any) -> VisualPositions:
    """Return the engine's default (``--visual-positions``)."""
    given = getattr(model_config.multimodal_config, VISUAL_POSITIONS, None)
    return VisualPositions.KEPT if given is None else given
