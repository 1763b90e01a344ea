# SPDX-License-Identifier: Apache-2.0
"""Saliency from a vLLM vision tower, which returns no attention maps."""
