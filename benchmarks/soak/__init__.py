# SPDX-License-Identifier: Apache-2.0
"""Correct answers and stable memory under load with faulty clients, and killed processes."""
