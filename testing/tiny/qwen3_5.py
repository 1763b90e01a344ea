# SPDX-License-Identifier: Apache-2.0
"""A small Qwen3.5 checkpoint: Qwen3-VL's tower before a hybrid of linear and full attention."""

from pathlib import Path

from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from small_vlm.checkpoint import BOS, EOS, PAD
from testing.tiny import qwen3_vl
from testing.tiny.llava import build_once
from testing.tiny.qwen3_vl import VISION, chat_tokenizer, marks_of, save


def build_qwen3_5(path: Path) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer, ids = chat_tokenizer()
        config = Qwen3_5Config(
            **marks_of(ids),
            tie_word_embeddings=False,
            vision_config=VISION,
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "layer_types": ["linear_attention", "full_attention", "full_attention"],
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 32,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [3, 3, 2],
                    "mrope_interleaved": True,
                },
                "tie_word_embeddings": False,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
            },
        )
        save(Qwen3_5ForConditionalGeneration(config), tokenizer, folder)

    source = Path(__file__).read_text() + Path(qwen3_vl.__file__).read_text()
    return build_once(path, {"kind": "qwen3.5", "builder": source}, write)
