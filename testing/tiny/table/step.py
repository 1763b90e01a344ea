# SPDX-License-Identifier: Apache-2.0
"""Step3-VL and Step-VL: vLLM's processor scales to 728 px, hence 169 tokens for each image."""

from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerFast

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import LAYERS, TOWER, copy_code, text, write_config
from testing.tiny.words import HIDDEN, chat_template, token_id, tokenizer_for

SIDE: Final = 728
PATCH: Final = 14
IMAGE: Final = "<im_patch>"
MARKS: Final = (
    IMAGE,
    *("<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"),
)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_for(chat_template(IMAGE), MARKS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _step3(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    config = {
        "model_type": "step3_vl",
        "vision_config": {
            **TOWER,
            "output_hidden_size": TOWER["hidden_size"],
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        "text_config": text(
            tokenizer,
            model_type="step3_text",
            architectures=["Step3TextForCausalLM"],
            head_dim=32,
            num_attention_groups=1,
            share_q_dim=HIDDEN // 2,
            moe_intermediate_size=HIDDEN // 2,
            moe_num_experts=4,
            moe_top_k=2,
            share_expert_dim=HIDDEN // 2,
            moe_layers_enum="1",  # of two layers, the second
        ),
        "understand_projector_stride": 2,
        "projector_bias": False,
        "image_token_id": token_id(tokenizer, IMAGE),
    }
    write_config(folder, "Step3VLForConditionalGeneration", config)


def _step(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    copy_code(folder, "step_vl_config")
    config = {
        "model_type": "step_robotics",
        "auto_map": {"AutoConfig": "step_vl_config.StepVLConfig"},
        "vision_config": {
            "width": TOWER["hidden_size"],
            "layers": LAYERS,
            "heads": 2,
            "mlp_ratio": 2.0,
            "output_dim": None,
            "hidden_act": "quick_gelu",
            "image_size": SIDE,
            "patch_size": PATCH,
            "use_abs_posemb": True,
            "use_cls_token": False,
            "use_rope2d": True,
            "use_ln_pre": True,
            "use_ln_post": False,
            "ls_init_value": 0.1,
        },
        "text_config": text(
            tokenizer, model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32
        ),
        "projector_bias": False,
        "image_token_id": token_id(tokenizer, IMAGE),
    }
    write_config(folder, "StepVLForConditionalGeneration", config)


ENTRIES: Final = (
    TinyModel("Step3VLForConditionalGeneration", _step3, image=IMAGE),
    TinyModel(
        "StepVLForConditionalGeneration",
        _step,
        image=IMAGE,
        # So the tower's output lies in memory as oneDNN's linear layer on a CPU requires.
        engine={"trust_remote_code": True, "mm_encoder_tp_mode": "data"},
    ),
)
