# SPDX-License-Identifier: Apache-2.0
"""Plots without a display."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, to be saved as PNG."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
