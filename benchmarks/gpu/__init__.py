# SPDX-License-Identifier: Apache-2.0
"""One report about one GPU: ``python -m benchmarks.gpu``."""
