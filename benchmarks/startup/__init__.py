# SPDX-License-Identifier: Apache-2.0
"""How long a server starts, and how much memory it has then, with and without the plugin."""
