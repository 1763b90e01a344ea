# SPDX-License-Identifier: Apache-2.0
"""The general adapter: for vLLM's models without an adapter of their own.

It needs what every model gives: one row of embeddings per visual token, and a placeholder with as
many embeddings. What a family would know about its tower and its grid, it reads from what it sees.
"""
