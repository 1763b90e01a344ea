# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of each model family, built on the spot with random weights."""
