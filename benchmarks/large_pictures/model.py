# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL with a narrow tower, which takes pictures of 16,384 visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from small_vlm.checkpoint import BOS, EOS, PAD
from testing.tiny.llava import build_once, draw_weights, train_tokenizer

PATCH: Final = 14
MERGE: Final = 2
SIDE: Final = 3584
"""Pixels along one side of the largest picture."""
TOKENS: Final = (SIDE // (PATCH * MERGE)) ** 2
CONTEXT: Final = 17_408
MARKS: Final = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE: Final = (
    "{% for message in messages %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}ASSISTANT:"
)


def build(path: Path, layers: int, full: list[int]) -> Path:
    """Write the checkpoint, unless it is there, and return its folder.

    Args:
        path: of the folder.
        layers: of the tower.
        full: which of them attend over the whole picture; the others do within windows.

    """

    def write(folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(1024).backend_tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            chat_template=TEMPLATE,
            clean_up_tokenization_spaces=False,
        )
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
        start, end, image, video = tokenizer.convert_tokens_to_ids(list(MARKS))
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32_768,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "mrope_section": [4, 6, 6],
                },
                "tie_word_embeddings": False,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
            },
            vision_config={
                "depth": layers,
                "num_heads": 2,
                "hidden_size": 64,
                "out_hidden_size": 128,
                "intermediate_size": 128,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": full,
                "tokens_per_second": 2,
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=False,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        draw_weights(model, tokenizer, 0)
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = EOS
        model.generation_config.pad_token_id = PAD
        model.save_pretrained(folder)
        grid = {
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": SIDE**2},
        }
        Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**grid),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**grid),
            chat_template=TEMPLATE,
        ).save_pretrained(folder)

    asked = {"layers": layers, "full": full, "builder": Path(__file__).read_text()}
    return build_once(path, asked, write)
