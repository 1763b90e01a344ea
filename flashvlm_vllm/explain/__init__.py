# SPDX-License-Identifier: Apache-2.0
"""Explains a selection: which tokens were kept, and their scores."""
