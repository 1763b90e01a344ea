# SPDX-License-Identifier: Apache-2.0
"""FLOPs, KV cache and latency, compared with the paper's table, FastV and VisPruner."""
