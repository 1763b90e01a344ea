# SPDX-License-Identifier: Apache-2.0
"""Text-guided visual token selection (FlashVLM) as a vLLM plugin."""

__version__ = "0.2.0"
