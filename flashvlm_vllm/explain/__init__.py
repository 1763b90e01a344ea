# SPDX-License-Identifier: Apache-2.0
"""Shows which tokens were kept, and why."""
