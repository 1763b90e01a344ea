# SPDX-License-Identifier: Apache-2.0
"""The ``flashvlm`` command."""
