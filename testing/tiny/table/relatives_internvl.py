# SPDX-License-Identifier: Apache-2.0
"""InternVL's relatives."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testing.tiny.internvl import (
    CONFIGURATION,
    CONTEXT,
    END,
    IMAGE_SIZE,
    MAX_TILES,
    PATCH_SIZE,
    START,
    VIDEO,
    hf_config,
    intern_tokenizer,
    save_processor,
)
from testing.tiny.table.entry import TinyModel
from testing.tiny.words import HEADS, HIDDEN, chat_template, text_settings, tokenizer_for

_IMAGE = "<image>\n"
_MARKS = (START, END, CONTEXT)
_VISION: dict[str, Any] = {
    "model_type": "intern_vit_6b",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "initializer_factor": 1.0,
}


def _tiled(
    architecture: str,
    marks: Sequence[str] = _MARKS,
    configuration: str | None = CONFIGURATION,
    vision: dict[str, Any] = _VISION,
    size: tuple[int, int] = (224, 168),
    **own: Any,
) -> TinyModel:
    """Return a model in OpenGVLab's format.

    Args:
        architecture: as in vLLM's registry.
        marks: special tokens around and in an image.
        configuration: code of the configuration's classes, if vLLM has none.
        vision: configuration of the tower.
        size: width and height of an image in the tests, in pixels.
        own: fields of the configuration that other models do not have.

    """

    def write(folder: Path) -> None:
        tokenizer = tokenizer_for(chat_template("<image>\\n"), marks)
        text = text_settings(
            tokenizer,
            layers=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
        )
        config = {
            "architectures": [architecture],
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": IMAGE_SIZE,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": MAX_TILES,
            "ps_version": "v2",
            "select_layer": -1,
            "use_thumbnail": True,
            "vision_config": vision,
            "llm_config": text,
            **own,
        }
        if configuration is not None:
            config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
            (folder / "configuration_internvl_chat.py").write_text(configuration)
        else:
            config["text_config"] = config.pop("llm_config")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(folder)

    return TinyModel(
        architecture,
        write,
        image=_IMAGE,
        template="USER: {items}{question} ASSISTANT:",
        size=size,
        engine={"trust_remote_code": True},
    )


def _write_interns1(folder: Path) -> None:
    tokenizer = intern_tokenizer("<IMG_CONTEXT>\\n", f"{VIDEO}\\n")
    config = hf_config(tokenizer, "qwen3")
    config.architectures = ["InternS1ForConditionalGeneration"]
    config.save_pretrained(folder)
    save_processor(tokenizer, folder)


_SIGLIP = CONFIGURATION.replace("Qwen2Config", "Qwen2Config, SiglipVisionConfig", 1).replace(
    "InternVisionConfig(**", "SiglipVisionConfig(**"
)

ENTRIES = (
    TinyModel(
        "InternS1ForConditionalGeneration",
        _write_interns1,
        image=CONTEXT,
        video="<|video_pad|>",
    ),
    _tiled("SkyworkR1VChatModel"),
    # Of this shape the second cut into tiles (``use_msac``) differs from the first.
    _tiled("H2OVLChatModel", size=(336, 112), use_msac=True),
    _tiled("NVLM_D", ("<Image>", "</Image>", "<|vision_pad|>")),
    _tiled("QianfanOCRForConditionalGeneration", configuration=None, model_type="qianfan_ocr"),
    _tiled(
        "Eagle2_5_VLForConditionalGeneration",
        configuration=_SIGLIP,
        vision={**_VISION, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
    ),
)
