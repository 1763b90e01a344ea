# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the selection. Imported where one is launched: triton is no dependency."""
