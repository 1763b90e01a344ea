# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: request fields, routes, what an answer reports, metrics."""
