# SPDX-License-Identifier: Apache-2.0
"""Code in the worker that all model families share."""
