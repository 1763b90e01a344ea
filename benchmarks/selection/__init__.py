# SPDX-License-Identifier: Apache-2.0
"""Cost of the selection, compared with the published loop and with the vision tower."""
