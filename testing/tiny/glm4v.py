# SPDX-License-Identifier: Apache-2.0
"""A small GLM-4V in the format of the public checkpoint, and its tower written out in PyTorch.

Transformers has no such model: public checkpoints carry their own code. So the weights are drawn
here, and the tower is computed once more without vLLM.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from small_vlm.checkpoint import EOS, HEAD_DIM
from testing.tiny.llava import SENTENCES, build_once, train_tokenizer
from testing.tiny.words import token_id

SIDE = 8
"""Patches along one side."""
TOKENS = (SIDE // 2) ** 2
PLACEHOLDER = "<|begin_of_image|><|endoftext|><|end_of_image|>"
_PATCH = 14
_HIDDEN = 64
_VISION_LAYERS = 2
_SCALING = 2.0


def build_glm4v(path: Path, *, with_vision: bool = True) -> Path:
    """Write the checkpoint, or its language model alone, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(1024)
        names = re.findall(r"<\|\w+\|>", PLACEHOLDER)
        tokenizer.add_special_tokens({"additional_special_tokens": names})
        begin, pad, end = (token_id(tokenizer, name) for name in names)
        size = len(tokenizer)
        vision = {
            "image_size": SIDE * _PATCH,
            "patch_size": _PATCH,
            "in_channels": 3,
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": _VISION_LAYERS,
            "num_heads": _HIDDEN // HEAD_DIM,
            "num_positions": SIDE * SIDE + 1,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "dropout_prob": 0.0,
            "scaling_factor": _SCALING,
        }
        config = {
            "architectures": ["GLM4VForCausalLM" if with_vision else "ChatGLMForCausalLM"],
            "model_type": "chatglm",
            "num_layers": 2,
            "padded_vocab_size": size,
            "hidden_size": _HIDDEN,
            "ffn_hidden_size": 2 * _HIDDEN,
            "kv_channels": HEAD_DIM,
            "num_attention_heads": _HIDDEN // HEAD_DIM,
            "seq_length": 4096,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "add_qkv_bias": True,
            "original_rope": True,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "pad_token_id": pad,
            "boi_token_id": begin,
            "eoi_token_id": end,
            "eos_token_id": EOS,
            **({"vision_config": vision} if with_vision else {}),
        }
        weights = _draw(tokenizer, vision)
        kept = {
            name: each for name, each in weights.items() if with_vision or ".vision." not in name
        }
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return build_once(path, {"kind": "glm4v", "vision": with_vision}, write)


def _shapes(vocab: int, vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    wide = 2 * _HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocab, _HIDDEN),
        "output_layer.weight": (vocab, _HIDDEN),
        "encoder.final_layernorm.weight": (_HIDDEN,),
        "vision.boi": (1, 1, _HIDDEN),
        "vision.eoi": (1, 1, _HIDDEN),
        "vision.patch_embedding.cls_embedding": (1, _HIDDEN),
        "vision.patch_embedding.position_embedding.weight": (vision["num_positions"], _HIDDEN),
        "vision.patch_embedding.proj.weight": (_HIDDEN, 3, _PATCH, _PATCH),
        "vision.patch_embedding.proj.bias": (_HIDDEN,),
        "vision.conv.weight": (_HIDDEN, _HIDDEN, 2, 2),
        "vision.conv.bias": (_HIDDEN,),
        "vision.linear_proj.linear_proj.weight": (_HIDDEN, _HIDDEN),
        "vision.linear_proj.norm1.weight": (_HIDDEN,),
        "vision.linear_proj.norm1.bias": (_HIDDEN,),
        "vision.linear_proj.gate_proj.weight": (wide, _HIDDEN),
        "vision.linear_proj.dense_h_to_4h.weight": (wide, _HIDDEN),
        "vision.linear_proj.dense_4h_to_h.weight": (_HIDDEN, wide),
    }
    for layer in range(2):
        name = f"encoder.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (_HIDDEN,),
            f"{name}.post_attention_layernorm.weight": (_HIDDEN,),
            f"{name}.self_attention.query_key_value.weight": (3 * _HIDDEN, _HIDDEN),
            f"{name}.self_attention.query_key_value.bias": (3 * _HIDDEN,),
            f"{name}.self_attention.dense.weight": (_HIDDEN, _HIDDEN),
            f"{name}.mlp.dense_h_to_4h.weight": (2 * wide, _HIDDEN),
            f"{name}.mlp.dense_4h_to_h.weight": (_HIDDEN, wide),
        }
    for layer in range(_VISION_LAYERS):
        name = f"vision.transformer.layers.{layer}"
        for linear, (high, low) in {
            "attention.query_key_value": (3 * _HIDDEN, _HIDDEN),
            "attention.dense": (_HIDDEN, _HIDDEN),
            "mlp.fc1": (wide, _HIDDEN),
            "mlp.fc2": (_HIDDEN, wide),
        }.items():
            shapes |= {f"{name}.{linear}.weight": (high, low), f"{name}.{linear}.bias": (high,)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{name}.{norm}.{kind}": (_HIDDEN,) for kind in ("weight", "bias")}
    return shapes


def _draw(tokenizer: Any, vision: dict[str, Any]) -> dict[str, Tensor]:
    """Draw weights for which attention is selective and one word leads, as in the tiny LLaVA."""
    generator = torch.Generator().manual_seed(0)
    gains = {"query_key_value": 2.0, "dense_4h_to_h": 2.0, "output_layer": 3.0}
    weights = {}
    for name, shape in _shapes(len(tokenizer), vision).items():
        layer, kind = name.split(".")[-2:]
        if kind == "bias":
            weight = torch.zeros(shape)
        elif len(shape) == 1:
            weight = torch.ones(shape)
        elif "embedding" in layer or kind in ("boi", "eoi") or "cls" in kind:
            weight = torch.randn(shape, generator=generator)
        else:
            scale = gains.get(layer, 1.0) / math.sqrt(math.prod(shape[1:]))
            weight = torch.randn(shape, generator=generator) * scale
        weights[f"transformer.{name}"] = weight
    words = {f" {word}" for word in re.findall(r"\b[a-z]+\b", " ".join(SENTENCES))}
    is_word = torch.tensor([tokenizer.decode([token]) in words for token in range(len(tokenizer))])
    weights["transformer.output_layer.weight"][~is_word] = 0.0
    return weights


class Reference:
    """Encodes an image as the tower does, without vLLM."""

    def __init__(self, path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        self.embedding = weights["transformer.embedding.word_embeddings.weight"]
        self._weights = {
            name.removeprefix("transformer.vision."): each for name, each in weights.items()
        }

    def _linear(self, rows: Tensor, name: str) -> Tensor:
        weights = self._weights
        return functional.linear(rows, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def _norm(self, rows: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = (self._weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)

    def encode(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return embeddings ``(TOKENS + 2, D)``, begin and end included, and ``(TOKENS,)``.

        The latter is the mean attention of the CLS token to the four patches of each token.
        """
        from vllm.transformers_utils.processors.glm4v import GLM4VImageProcessorFast

        weights, side = self._weights, SIDE * _PATCH
        resize = GLM4VImageProcessorFast(size={"width": side, "height": side})
        pixels = resize(image, return_tensors="pt")["pixel_values"]
        patches = functional.conv2d(
            pixels,
            weights["patch_embedding.proj.weight"],
            weights["patch_embedding.proj.bias"],
            stride=_PATCH,
        )
        rows = torch.cat([weights["patch_embedding.cls_embedding"], patches[0].flatten(1).T])
        rows = rows + weights["patch_embedding.position_embedding.weight"]
        for layer in range(_VISION_LAYERS):
            name = f"transformer.layers.{layer}"
            qkv = self._linear(rows, f"{name}.attention.query_key_value")
            query, key, value = (
                each.unflatten(1, (-1, HEAD_DIM)).transpose(0, 1) for each in qkv.chunk(3, dim=1)
            )
            attention = (query @ key.mT / math.sqrt(HEAD_DIM)).softmax(dim=-1)
            out = (attention @ value).transpose(0, 1).flatten(1)
            out = self._linear(out, f"{name}.attention.dense")
            rows = rows + self._norm(out, f"{name}.input_layernorm", 1e-6)
            out = functional.gelu(self._linear(rows, f"{name}.mlp.fc1"))
            out = self._linear(out, f"{name}.mlp.fc2")
            rows = rows + self._norm(out, f"{name}.post_attention_layernorm", 1e-6)
        seen = attention[:, 0, 1:].mean(dim=0).view(1, SIDE, SIDE)
        grid = rows[1:].T.reshape(1, -1, SIDE, SIDE)
        merged = functional.conv2d(grid, weights["conv.weight"], weights["conv.bias"], stride=2)
        rows = self._linear(merged[0].flatten(1).T, "linear_proj.linear_proj")
        rows = functional.gelu(self._norm(rows, "linear_proj.norm1", 1e-5))
        gate = functional.silu(self._linear(rows, "linear_proj.gate_proj"))
        rows = gate * self._linear(rows, "linear_proj.dense_h_to_4h")
        rows = self._linear(rows, "linear_proj.dense_4h_to_h")
        rows = torch.cat([weights["boi"][0], rows, weights["eoi"][0]]) / _SCALING
        return rows, functional.avg_pool2d(seen, 2).flatten()
