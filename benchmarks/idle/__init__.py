# SPDX-License-Identifier: Apache-2.0
"""Cost of the plugin for requests without a budget."""
