# SPDX-License-Identifier: Apache-2.0
"""Pixtral in Mistral's own format."""

from testing.tiny.mistral_format import prompt_ids, write_files
from testing.tiny.table.entry import TinyModel

ENTRIES = (
    TinyModel(
        "PixtralForConditionalGeneration",
        write_files,
        image="[IMG]",
        tokens=prompt_ids,
        engine={
            "config_format": "mistral",
            "tokenizer_mode": "mistral",
            "limit_mm_per_prompt": {"image": 2},
        },
    ),
)
