# SPDX-License-Identifier: Apache-2.0
"""A LLaVA small enough to be trained on two CPU cores, and the drawn world it can see."""
