# SPDX-License-Identifier: Apache-2.0
"""Compares what this plugin touches of vLLM in two releases, without importing either."""
