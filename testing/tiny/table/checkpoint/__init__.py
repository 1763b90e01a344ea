# SPDX-License-Identifier: Apache-2.0
"""Processors that public checkpoints bring as code of their own, at the size that vLLM needs.

The files are copied into a model's folder; they import nothing of this project but each other.
"""
