# SPDX-License-Identifier: Apache-2.0
"""A table of tiny models, one entry for each architecture of vLLM, for one battery of tests.

An entry has a configuration and a processor, no weights: they are drawn when the engine has loaded.
"""
