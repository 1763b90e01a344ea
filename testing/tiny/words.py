# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and chat templates of the tiny models, with each family's own special tokens."""

from collections.abc import Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from small_vlm.checkpoint import BOS, EOS, PAD
from testing.tiny.llava import train_tokenizer

HIDDEN: Final = 128
HEADS: Final = 4


def tokenizer_with(marks: dict[str, str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens by the names that a family's processor reads."""
    return _tokenizer(extra_special_tokens=marks, padding_side="left")


def tokenizer_for(template: str, marks: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template and additional special tokens."""
    tokenizer = _tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


def _tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    # LLaVA's name for its image token is left out: other processors would use that token.
    words = train_tokenizer(1024)
    return PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        unk_token=words.unk_token,
        bos_token=words.bos_token,
        eos_token=words.eos_token,
        pad_token=words.pad_token,
        clean_up_tokenization_spaces=False,
        **settings,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, mark: str) -> int:
    """Return the id of one token."""
    found = tokenizer.convert_tokens_to_ids(mark)
    if not isinstance(found, int):
        raise TypeError(f"{mark} is not one token")
    return found


def text_settings(tokenizer: PreTrainedTokenizerFast, layers: int, **own: Any) -> dict[str, Any]:
    """Return the configuration of a small language model, with a family's ``own`` fields."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **own,
    }


def rotary(section: Sequence[int], **own: Any) -> dict[str, Any]:
    """Return the parameters of M-RoPE: rotated channels of time, row and column."""
    return {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": list(section),
        **own,
    }


def chat_template(image: str, video: str | None = None) -> str:
    """Return a template that writes ``image`` or ``video`` where a message has one."""
    part = "" if video is None else _VIDEO.replace("{{ VIDEO }}", f"{{{{ '{video}' }}}}")
    return _TEMPLATE.replace("VIDEO_PART\n", part).replace("{{ IMAGE }}", f"{{{{ '{image}' }}}}")


_VIDEO = "{%- elif part['type'] == 'video' -%}{{ VIDEO }}\n"
_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() + ': ' }}
{%- if message['content'] is string -%}
{{ message['content'] + ' ' }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ IMAGE }}
VIDEO_PART
{%- elif part['type'] == 'text' -%}{{ part['text'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
