# SPDX-License-Identifier: Apache-2.0
"""Compares the parts of vLLM that this plugin uses in two releases, without importing either."""
