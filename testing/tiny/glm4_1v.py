# SPDX-License-Identifier: Apache-2.0
"""A small GLM-4.1V checkpoint with GLM's marks and template."""

from pathlib import Path

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    PreTrainedTokenizerFast,
)

from small_vlm.checkpoint import BOS, EOS, PAD
from testing.tiny.llava import build_once, draw_weights, train_tokenizer

PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE
"""Pixels along one side of a token."""
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{IMAGE}"
    f"{{% elif part['type'] == 'video' %}}{VIDEO}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_MARKS = {
    "image_start_token_id": "<|begin_of_image|>",
    "image_token_id": "<|image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_token_id": "<|video|>",
    "video_end_token_id": "<|end_of_video|>",
}
_HIDDEN, _HEADS = 128, 4


def build_glm4_1v(path: Path) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        # Without LLaVA's own name for its image token, which would be taken for GLM's.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(1024).backend_tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            chat_template=TEMPLATE,
            clean_up_tokenization_spaces=False,
        )
        roles = ["<|system|>", "<|user|>", "<|assistant|>"]
        marks = ["[gMASK]", "<sop>", *roles, *_MARKS.values()]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        config = Glm4vConfig(
            **{name: tokenizer.convert_tokens_to_ids(mark) for name, mark in _MARKS.items()},
            tie_word_embeddings=False,
            vision_config={
                "depth": 2,
                "num_heads": 2,
                "hidden_size": 64,
                "out_hidden_size": _HIDDEN,
                "intermediate_size": 128,
                "image_size": 8 * PATCH,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
            },
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": _HIDDEN,
                "intermediate_size": 2 * _HIDDEN,
                "num_hidden_layers": 2,
                "num_attention_heads": _HEADS,
                "num_key_value_heads": _HEADS,
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 3, 3],
                },
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
            },
        )
        model = Glm4vForConditionalGeneration(config)
        draw_weights(model, tokenizer, 0)
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = EOS
        model.generation_config.pad_token_id = PAD
        model.save_pretrained(folder)
        # A picture counts as two frames here.
        size = {"shortest_edge": 2 * 4 * UNIT**2, "longest_edge": 2 * 64 * UNIT**2}
        grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, "size": size}
        Glm4vProcessor(
            image_processor=Glm4vImageProcessor(**grid),
            tokenizer=tokenizer,
            video_processor=Glm4vVideoProcessor(**grid),
            chat_template=TEMPLATE,
        ).save_pretrained(folder)

    asked = {"kind": "glm4.1v", "builder": Path(__file__).read_text()}
    return build_once(path, asked, write)
