# SPDX-License-Identifier: Apache-2.0
"""Cost of further questions about one image."""
