# SPDX-License-Identifier: Apache-2.0
"""One thin adapter per model family."""
