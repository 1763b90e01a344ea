# SPDX-License-Identifier: Apache-2.0
"""Multimodal processing in the API process: token counts, cache identities, placeholders."""
