# SPDX-License-Identifier: Apache-2.0
"""Layouts of the tokens of an image or a video, shared by several model families."""
