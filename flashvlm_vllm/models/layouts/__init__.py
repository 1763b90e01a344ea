# SPDX-License-Identifier: Apache-2.0
"""How the tokens of an image or a video are laid out, by kind."""
