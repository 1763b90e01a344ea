# SPDX-License-Identifier: Apache-2.0
"""Parts of the time of one request."""
