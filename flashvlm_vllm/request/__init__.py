# SPDX-License-Identifier: Apache-2.0
"""The request fields of this plugin: parsing, validation, refusals."""
