# SPDX-License-Identifier: Apache-2.0
"""A VLM of a real language model, a real tower and real pictures: where do its words attend?"""
