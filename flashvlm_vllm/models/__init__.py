# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family."""
