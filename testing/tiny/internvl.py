# SPDX-License-Identifier: Apache-2.0
"""A small InternVL, in the format of OpenGVLab and in that of Transformers, of equal weights.

InternViT at 112 px and patch 14, hence 64 patches and 16 visual tokens per tile, up to four tiles
and a thumbnail; a Qwen2 below. The text around images and videos is made of special tokens as in
public checkpoints.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)

from testing.tiny.llava import build_once, draw_weights
from testing.tiny.words import (
    HEADS,
    HIDDEN,
    chat_template,
    text_settings,
    token_id,
    tokenizer_with,
)

IMAGE_SIZE = 112
PATCH_SIZE = 14
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
TOKENS = PATCHES // 4
MAX_TILES = 4

START, END, CONTEXT, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# OpenGVLab's checkpoints carry their configuration classes; Transformers has none of its own.
CONFIGURATION = """\
from transformers import PretrainedConfig, Qwen2Config


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**kwargs)
"""


def build_internvl_hf(path: Path, language_model: str = "qwen2") -> Path:
    """Write a checkpoint in Transformers' format and return its folder.

    Args:
        path: of the folder.
        language_model: type of the language model, by Transformers' names.

    """

    def write(folder: Path) -> None:
        tokenizer = intern_tokenizer("<IMG_CONTEXT>\\n", f"{VIDEO}\\n")
        model = _model(tokenizer, language_model)
        model.save_pretrained(folder)
        save_processor(tokenizer, folder)

    return build_once(path, {"kind": "internvl-hf", "language_model": language_model}, write)


def build_internvl(path: Path) -> Path:
    """Write a checkpoint in OpenGVLab's format and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = intern_tokenizer("<image>\\n", "<video>\\n")
        model = _model(tokenizer)
        save_file(
            chat_weights(model.state_dict()),
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        vision = model.config.vision_config
        config = {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": IMAGE_SIZE,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": MAX_TILES,
            "ps_version": "v2",
            "select_layer": -1,
            "use_thumbnail": True,
            "torch_dtype": "float32",
            "llm_config": model.config.text_config.to_dict(),
            "vision_config": {
                "model_type": "intern_vit_6b",
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_hidden_layers,
                "num_attention_heads": vision.num_attention_heads,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "qkv_bias": True,
                "qk_normalization": False,
                "norm_type": "layer_norm",
                "layer_norm_eps": vision.layer_norm_eps,
                "hidden_act": "gelu",
                "initializer_factor": 1.0,
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "configuration_internvl_chat.py").write_text(CONFIGURATION)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return build_once(path, {"kind": "internvl-chat"}, write)


def chat_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give Transformers' weights OpenGVLab's names; q, k and v lie in one matrix there."""
    names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_model.",
        "model.multi_modal_projector.layer_norm.": "mlp1.0.",
        "model.multi_modal_projector.linear_1.": "mlp1.1.",
        "model.multi_modal_projector.linear_2.": "mlp1.3.",
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer.": "attn.proj.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "lambda_": "ls",
    }
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".attention.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            name, weight = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        elif ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = weight.contiguous()
    return renamed


def intern_tokenizer(image: str, video: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with InternVL's marks; its template writes ``image`` and ``video``."""
    tokenizer = tokenizer_with(
        {
            "start_image_token": START,
            "end_image_token": END,
            "context_image_token": CONTEXT,
            "video_token": VIDEO,
        }
    )
    tokenizer.chat_template = chat_template(image, video=video)
    return tokenizer


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer and processor of Transformers' format."""
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            crop_to_patches=True,
            min_patches=1,
            max_patches=MAX_TILES,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        ),
        image_seq_length=TOKENS,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)


def hf_config(tokenizer: PreTrainedTokenizerFast, language_model: str = "qwen2") -> InternVLConfig:
    """Return the configuration in Transformers' format."""
    return InternVLConfig(
        vision_config={
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 4,
            "num_attention_heads": HEADS,
            "attention_bias": True,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
        },
        text_config=text_settings(
            tokenizer,
            layers=3,
            model_type=language_model,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
        image_token_id=token_id(tokenizer, CONTEXT),
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )


def _model(tokenizer: PreTrainedTokenizerFast, language_model: str = "qwen2") -> Any:
    config = hf_config(tokenizer, language_model)
    model: Any = InternVLForConditionalGeneration(config)
    draw_weights(model, tokenizer, seed=0)
    return model
