# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA, an architecture that vLLM does not include."""
