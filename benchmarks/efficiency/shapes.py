# SPDX-License-Identifier: Apache-2.0
"""The models: a scaled LLaVA-NeXT with weights for a CPU, and the 7B's shape without for a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from benchmarks.efficiency.formulas import CLIP_L, LLAMA_7B, Shape
from small_vlm.checkpoint import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD
from testing.tiny.llava import (
    GRID_PINPOINTS,
    IMAGE_SIZE,
    PATCH_SIZE,
    build_llava,
    image_processor,
    train_tokenizer,
)


@dataclass(frozen=True)
class Model:
    """A checkpoint, how vLLM is started on it, and what formulas need."""

    name: str
    path: Path
    shape: Shape
    value_bytes: int
    arguments: tuple[str, ...]
    device: str

    def on_transformers(self) -> Any:
        """Build or load it there."""
        if self.device == "cpu":
            return LlavaNextForConditionalGeneration.from_pretrained(self.path, dtype=torch.float32)
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device(self.device):
                config = LlavaNextConfig.from_pretrained(self.path)
                return LlavaNextForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(torch.float32)


# 2880 patches and 48 row newlines in one step, as the paper's forward pass.
ONE_STEP: Final = ("--max-model-len", "4096", "--max-num-batched-tokens", "4096")

# Over what servers get that run on a CPU.
ON_GPU: Final = ("--load-format", "dummy", "--dtype", "half", "--no-enforce-eager")


def scaled(folder: Path, hidden: int, layers: int, vision_hidden: int, vision_layers: int) -> Model:
    """Write a LLaVA-NeXT that a CPU can serve, random weights, float32."""
    path = build_llava(
        folder / f"efficiency-llava-next-{hidden}x{layers}",
        next=True,
        hidden=hidden,
        layers=layers,
        vision_hidden=vision_hidden,
        vision_layers=vision_layers,
    )
    shape = Shape(layers, hidden, 2 * hidden)
    return Model("scaled LLaVA-NeXT", path, shape, 4, ONE_STEP, "cpu")


def true_7b(folder: Path) -> Model:
    """Write the shape of LLaVA-NeXT-7B; vLLM and Transformers make up the weights."""
    path = write_shape(
        folder / "efficiency-llava-next-7b-shape",
        LLAMA_7B,
        CLIP_L,
        head=128,
        vision_head=64,
        next=True,
    )
    # Two servers and Transformers' model share the GPU.
    arguments = (*ONE_STEP, *ON_GPU, "--gpu-memory-utilization", "0.3")
    return Model("LLaVA-NeXT-7B's shape", path, LLAMA_7B, 2, arguments, "cuda")


def write_shape(
    path: Path, llm: Shape, tower: Shape, head: int, vision_head: int, *, next: bool
) -> Path:
    """Write config, tokenizer and processor of a LLaVA-1.5 or LLaVA-NeXT, but no weights.

    The vocabulary is the small one of the tests: its head is the smaller for it, by 2 % of 7B's
    parameters, all of which work on one token of a prompt.
    """
    tokenizer = train_tokenizer(1024)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=llm.width,
        intermediate_size=llm.mlp,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.width // head,
        num_key_value_heads=llm.width // head,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    vision = CLIPVisionConfig(
        hidden_size=tower.width,
        intermediate_size=tower.mlp,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.width // vision_head,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=tower.width,
    )
    settings: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if next:
        settings["image_grid_pinpoints"] = GRID_PINPOINTS
    kind = LlavaNextConfig if next else LlavaConfig
    architecture = LlavaNextForConditionalGeneration if next else LlavaForConditionalGeneration
    kind(**settings, architectures=[architecture.__name__]).save_pretrained(path)
    (LlavaNextProcessor if next else LlavaProcessor)(
        image_processor=image_processor("clip", next),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    return path
