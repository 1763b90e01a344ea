# SPDX-License-Identifier: Apache-2.0
"""The steps of the report, one process each."""
