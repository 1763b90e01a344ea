# SPDX-License-Identifier: Apache-2.0
"""Small Qwen2-VL and Qwen2.5-VL checkpoints with a ChatML template."""

from pathlib import Path
from typing import Any, Literal

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from small_vlm.checkpoint import BOS, EOS, PAD
from testing.tiny.llava import build_once, draw_weights, train_tokenizer

Version = Literal["2", "2.5"]

PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE
"""Pixels along one side of a token."""
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
TURN, OVER = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HIDDEN, _HEADS = 128, 4


def build_qwen_vl(path: Path, version: Version) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        marks = [TURN, OVER, START, END, "<|vision_pad|>", IMAGE, VIDEO]
        # Without LLaVA's own name for its image token, which would be taken for Qwen's.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(1024).backend_tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            chat_template=CHATML,
            clean_up_tokenization_spaces=False,
        )
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
        vision: dict[str, Any] = {
            "depth": 2,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        }
        if version == "2":
            vision |= {"embed_dim": 64, "hidden_size": _HIDDEN, "mlp_ratio": 2}
        else:
            vision |= {
                "hidden_size": 64,
                "out_hidden_size": _HIDDEN,
                "intermediate_size": 128,
                "window_size": 2 * UNIT,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            }
        settings: dict[str, Any] = {
            "text_config": {
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
                    "mrope_section": [4, 6, 6],
                },
                "tie_word_embeddings": False,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
            },
            "vision_config": vision,
            "image_token_id": ids[IMAGE],
            "video_token_id": ids[VIDEO],
            "vision_start_token_id": ids[START],
            "vision_end_token_id": ids[END],
            "tie_word_embeddings": False,
        }
        model: Any = (
            Qwen2VLForConditionalGeneration(Qwen2VLConfig(**settings))
            if version == "2"
            else Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
        )
        draw_weights(model, tokenizer, 0)
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = EOS
        model.generation_config.pad_token_id = PAD
        model.save_pretrained(folder)
        size = {"shortest_edge": UNIT**2, "longest_edge": 64 * UNIT**2}
        grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, "size": size}
        (Qwen2VLProcessor if version == "2" else Qwen2_5_VLProcessor)(
            image_processor=Qwen2VLImageProcessor(**grid),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**grid),
            chat_template=CHATML,
        ).save_pretrained(folder)

    asked = {"kind": "qwen-vl", "version": version, "builder": Path(__file__).read_text()}
    return build_once(path, asked, write)
