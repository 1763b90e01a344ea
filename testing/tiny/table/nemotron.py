# SPDX-License-Identifier: Apache-2.0
"""Nemotron Nano VL 2: the smallest RADIO that vLLM knows, and a Nemotron-H with one Mamba layer."""

from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import copy_code, text, write_config
from testing.tiny.words import HIDDEN, chat_template, tokenizer_for

SIDE: Final = 128
PATCH: Final = 16
MARKS: Final = ("<image>", "<img>", "</img>", "<video>", "<so_start>", "<so_end>", "<so_embedding>")


def _nemotron(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template("<image>", "<video>"), MARKS)
    tokenizer.save_pretrained(folder)
    copy_code(folder, "nemotron_config")
    config = {
        "model_type": "NemotronH_Nano_VL_V2",
        "auto_map": {"AutoConfig": "nemotron_config.NemotronVLConfig"},
        "vision_config": {
            "args": {"model": "vit_small_patch16_224", "cpe_max_size": 2 * SIDE},
            "preferred_resolution": [SIDE, SIDE],
            "patch_size": PATCH,
        },
        "llm_config": text(
            tokenizer,
            model_type="nemotron_h",
            architectures=["NemotronHForCausalLM"],
            layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
            num_hidden_layers=4,
            head_dim=32,
            mamba_num_heads=4,
            mamba_head_dim=32,
            n_groups=1,
            ssm_state_size=16,
            torch_dtype="bfloat16",
        ),
        "force_image_size": SIDE,
        "patch_size": PATCH,
        "downsample_ratio": 0.5,
        "template": "chatml",
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "use_thumbnail": True,
        "vit_hidden_size": 384,
        "projector_hidden_size": HIDDEN,
        "norm_mean": [0.5] * 3,
        "norm_std": [0.5] * 3,
        "torch_dtype": "bfloat16",
    }
    write_config(folder, "NemotronH_Nano_VL_V2", config)


ENTRIES: Final = (
    TinyModel(
        "NemotronH_Nano_VL_V2",
        _nemotron,
        image="<image>",
        video="<video>",
        engine={
            "trust_remote_code": True,
            # vLLM's code turns the tower's output into bfloat16 whatever the model's type is.
            "dtype": "bfloat16",
            # On a CPU vLLM's Mamba 2 keeps the state of a whole prompt only.
            "enable_prefix_caching": False,
        },
    ),
)
