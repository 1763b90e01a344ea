# SPDX-License-Identifier: Apache-2.0
"""Every place where vLLM offers no hook and is wrapped."""
