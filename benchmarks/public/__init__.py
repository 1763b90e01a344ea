# SPDX-License-Identifier: Apache-2.0
"""The paper's public benchmarks through lmms-eval."""
