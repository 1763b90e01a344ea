# SPDX-License-Identifier: Apache-2.0
"""A LLaVA small enough to be trained on two CPU cores, and drawn scenes for it."""

from pathlib import Path
from typing import Final

WEIGHTS: Final = Path(__file__).parent / "weights"
"""The trained model, as Transformers and vLLM read it, with the log of its training."""
