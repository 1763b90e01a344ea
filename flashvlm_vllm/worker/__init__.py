# SPDX-License-Identifier: Apache-2.0
"""What every model family does alike in the worker."""
