# SPDX-License-Identifier: Apache-2.0
"""Published methods that work inside the vision tower or the language model, on Transformers."""
