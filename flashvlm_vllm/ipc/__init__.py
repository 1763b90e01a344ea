# SPDX-License-Identifier: Apache-2.0
"""Data sent between the API process and the workers. Each type packs and unpacks itself."""
