# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA, which vLLM does not have."""
