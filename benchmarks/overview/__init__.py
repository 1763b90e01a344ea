# SPDX-License-Identifier: Apache-2.0
"""Plot and tables of several benchmarks' committed results; measures nothing."""
