# SPDX-License-Identifier: Apache-2.0
"""The words of the tiny models, with each family's own marks and template."""

from transformers import PreTrainedTokenizerFast

from testing.tiny.llava import train_tokenizer


def tokenizer_with(marks: dict[str, str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens by the names that a family's processor reads.

    Without LLaVA's own name for its image token, which other processors would take for theirs.
    """
    words = train_tokenizer(1024)
    return PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        unk_token=words.unk_token,
        bos_token=words.bos_token,
        eos_token=words.eos_token,
        pad_token=words.pad_token,
        extra_special_tokens=marks,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def chat_template(mark: str) -> str:
    """Return a template that writes ``mark`` where a message has an image."""
    return _TEMPLATE.replace("{{ MARK }}", f"{{{{ '{mark}' }}}}")


_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() + ': ' }}
{%- if message['content'] is string -%}
{{ message['content'] + ' ' }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ MARK }}
{%- elif part['type'] == 'text' -%}{{ part['text'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
