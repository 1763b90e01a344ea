# SPDX-License-Identifier: Apache-2.0
"""Wraps of vLLM functions, for which vLLM has no hooks."""
