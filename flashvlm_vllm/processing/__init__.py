# SPDX-License-Identifier: Apache-2.0
"""In the API process, before the scheduler: counts, cache identities, shorter placeholders."""
