# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the plugin; ``python -m benchmarks`` lists them."""
