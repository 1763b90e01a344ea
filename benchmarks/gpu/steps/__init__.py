# SPDX-License-Identifier: Apache-2.0
"""What is measured, a process for each step."""
