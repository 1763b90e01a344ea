# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks through lmms-eval, a run per budget."""
