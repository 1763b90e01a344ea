# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every selector on a small model and drawn scenes."""
