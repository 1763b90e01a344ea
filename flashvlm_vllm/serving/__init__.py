# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: request fields, routes, usage in responses, metrics."""
