# SPDX-License-Identifier: Apache-2.0
"""Kernels, answers, throughput and latency on a GPU."""
