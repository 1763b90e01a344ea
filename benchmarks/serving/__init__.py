# SPDX-License-Identifier: Apache-2.0
"""Throughput of a server with budgets, compared with stock vLLM."""
