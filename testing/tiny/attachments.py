# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters and drafters for the tiny models, with random weights.

They change, or guess at, every word, and mean nothing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 4

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What a drafter of one layer has in common with its model."""


def build_adapter(
    path: Path, model: Path, targets: Sequence[str], *, size: float, seed: int = 0
) -> Path:
    """Write a LoRA adapter in PEFT's format for the linear layers and embeddings of ``model``.

    Args:
        path: the folder to write.
        model: a checkpoint.
        targets: ends of the names of those modules that get a pair of matrices.
        size: of what the adapter adds, about, relative to what the weights give.
        seed: of the random numbers.

    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(str(model / "model.safetensors"), framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if not module.endswith(tuple(targets)):
                continue
            weight = weights.get_tensor(name)
            rows, columns = weight.shape
            is_vocabulary = module.endswith("embed_tokens")
            down, up = (rows, columns) if is_vocabulary else (columns, rows)
            names = ("embedding_A", "embedding_B") if is_vocabulary else ("A.weight", "B.weight")
            spread = size * float(weight.std()) * RANK**-0.5
            prefix = f"base_model.model.{module}.lora_"
            tensors[prefix + names[0]] = torch.randn(RANK, down, generator=generator)
            tensors[prefix + names[1]] = torch.randn(up, RANK, generator=generator) * spread
    if not tensors:
        raise ValueError(f"{model} has none of {', '.join(targets)}")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in targets}),
    }
    _write(path, settings, tensors, "adapter_config.json", "adapter_model.safetensors")
    return path


def build_eagle(path: Path, model: Path, *, seed: int = 0) -> Path:
    """Write an EAGLE-3 drafter of one Llama layer for ``model``."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    # The layers are given: vLLM's default choice is for models with more of them.
    seen = list(range(min(3, text["num_hidden_layers"])))
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = (
        text[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )

    def draw(rows: int, columns: int) -> torch.Tensor:
        scale: float = columns**-0.5
        return torch.randn(rows, columns, generator=generator) * scale

    layer = {
        **{f"self_attn.{name}_proj": draw(hidden, 2 * hidden) for name in "qkv"},
        "self_attn.o_proj": draw(hidden, hidden),
        "mlp.gate_proj": draw(inner, hidden),
        "mlp.up_proj": draw(inner, hidden),
        "mlp.down_proj": draw(hidden, inner),
        **{
            norm: torch.ones(hidden)
            for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        },
    }
    tensors = {
        **{f"midlayer.{name}.weight": weight for name, weight in layer.items()},
        "fc.weight": draw(hidden, len(seen) * hidden),
        "lm_head.weight": draw(vocab, hidden),
        "norm.weight": torch.ones(hidden),
    }
    settings = {
        **{name: text[name] for name in _SHAPE if name in text},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": vocab,
        "eagle_aux_hidden_state_layer_ids": seen,
        "num_aux_hidden_states": len(seen),
        "dtype": "float32",
    }
    _write(path, settings, tensors, "config.json", "model.safetensors")
    return path


def take_language_model(path: Path, model: Path) -> Path:
    """Write the language model of a LLaVA as a checkpoint of its own, for drafting."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    prefix = "language_model."
    with safe_open(str(model / "model.safetensors"), framework="pt") as weights:
        tensors = {
            name.removeprefix(prefix): weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118
            if name.startswith(prefix)
        }
    settings = {
        **text,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    }
    _write(path, settings, tensors, "config.json", "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, path / name)
    return path


def _write(
    path: Path,
    settings: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    settings_name: str,
    tensors_name: str,
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / settings_name).write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors, str(path / tensors_name))
