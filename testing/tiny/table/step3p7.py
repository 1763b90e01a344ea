# SPDX-License-Identifier: Apache-2.0
"""Step 3.7: vLLM's processor scales to 728 px, hence 169 tokens for each image."""

from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HEADS,
    HIDDEN,
    LAYERS,
    save_marked,
    text_fields,
    write_config,
    write_configuration,
)
from testing.tiny.words import token_id

_MARKS: Final = (
    *("<im_patch>", "<im_start>", "<im_end>"),
    *("<patch_start>", "<patch_end>", "<patch_newline>"),
)


def _write(folder: Path) -> None:
    tokenizer = save_marked(folder, *_MARKS)
    parts = {
        "text_config": "vllm.transformers_utils.configs.step3p5.Step3p5Config",
        "vision_config": "PretrainedConfig",
    }
    config = {
        **write_configuration(folder, "step3p7", parts),
        "vision_config": {
            "width": HIDDEN,
            "layers": LAYERS,
            "heads": HEADS,
            "mlp_ratio": 2.0,
            "output_dim": None,
            "hidden_act": "quick_gelu",
            "image_size": 728,
            "patch_size": 14,
            "use_abs_posemb": True,
            "use_cls_token": False,
            "use_rope2d": True,
            "use_ln_pre": True,
            "use_ln_post": False,
            "ls_init_value": 0.1,
        },
        "text_config": text_fields(
            tokenizer,
            architectures=["Step3p5ForCausalLM"],
            head_dim=HIDDEN // HEADS,
            num_attention_groups=HEADS,
            use_moe=True,
            moe_layers_enum="1",
            moe_num_experts=4,
            moe_top_k=2,
            moe_intermediate_size=HIDDEN,
            share_expert_dim=HIDDEN,
            rope_theta=10_000.0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "projector_bias": False,
        "image_token_id": token_id(tokenizer, "<im_patch>"),
    }
    write_config(folder, "Step3p7ForConditionalGeneration", config)


ENTRIES: Final = [
    TinyModel(
        architecture="Step3p7ForConditionalGeneration",
        write=_write,
        image="<im_patch>",
        engine={"trust_remote_code": True},
    ),
]
