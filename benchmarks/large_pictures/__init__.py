# SPDX-License-Identifier: Apache-2.0
"""Cost of an image of 16,384 visual tokens, and the delay of other requests."""
