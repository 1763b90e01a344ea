# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the selection. Imported only where they are launched: triton is optional."""
