# SPDX-License-Identifier: Apache-2.0
"""What selection costs in accuracy: the paper's tables on a small VLM that can see."""
