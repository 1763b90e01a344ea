# SPDX-License-Identifier: Apache-2.0
"""How `llm-attention` was found: every variant that was tried, on development questions."""
