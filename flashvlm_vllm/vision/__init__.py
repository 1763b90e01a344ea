# SPDX-License-Identifier: Apache-2.0
"""Saliency from vLLM's vision towers, which do not return attention weights."""
