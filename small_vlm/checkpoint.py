# SPDX-License-Identifier: Apache-2.0
"""What all LLaVA checkpoints of this repository share: special tokens, template, names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from safetensors.torch import load_file, save_file

HEAD_DIM: Final = 32  # The smallest head that vLLM's CPU attention supports.

SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>", "<pad>", "<image>")  # Llama's order; ids 0 to 4.
UNK, BOS, EOS, PAD, IMAGE = range(len(SPECIAL_TOKENS))

# What each image processor uses in public checkpoints.
PIXEL_MEAN: Final = {"clip": [0.48145466, 0.4578275, 0.40821073], "siglip": [0.5, 0.5, 0.5]}
PIXEL_STD: Final = {"clip": [0.26862954, 0.26130258, 0.27577711], "siglip": [0.5, 0.5, 0.5]}

# LLaVA-1.5's: images first, then the text. Content may be a string or a list of parts.
CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- if message['content'] is string -%}
{{ message['content'] + ' ' }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}{{ '<image>\\n' }}{%- endif -%}
{%- endfor -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] + ' ' }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def rename_tower(file: Path) -> None:
    """Give the tower the key names of public checkpoints, which vLLM 0.32 requires.

    Transformers 5 writes ``vision_tower.encoder...`` and reads
    ``vision_tower.vision_model.encoder...`` as well; vLLM reads only the latter.
    """
    weights = load_file(file)
    renamed = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key): value
        for key, value in weights.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
