# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 with a projector and low-rank adapters, and how its prompts are built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.language_attention.real_parts.parts import FOLDER, WIDTH, Lite0
from benchmarks.language_attention.real_parts.scenes import Pixels

RANK: Final = 32
PATCH: Final = 16
"""Pixels of a side."""
LENGTH: Final = 3.0
"""Standard deviation of an untrained projector's output, in that of the word embeddings."""


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter."""

    def __init__(self, frozen: nn.Linear) -> None:
        """Begin as the frozen layer."""
        super().__init__()
        outputs, inputs = frozen.weight.shape
        self.frozen = frozen
        self.down = nn.Parameter(torch.randn(RANK, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output."""
        inner = functional.linear(hidden, self.down.to(hidden.dtype))
        more = functional.linear(inner, self.up.to(hidden.dtype))
        out: Tensor = self.frozen(hidden) + 2.0 * more
        return out

    def merged(self) -> nn.Linear:
        """Return one linear layer of both."""
        with torch.no_grad():
            self.frozen.weight.add_(2.0 * (self.up @ self.down).to(self.frozen.weight.dtype))
        return self.frozen


class RealVLM(nn.Module):
    """The model. Only projector and adapters are trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Load the published parts; projector and adapters are new."""
        super().__init__()
        config: Any = LlamaConfig.from_json_file(FOLDER / "language.json")
        config._attn_implementation = "sdpa"
        language: Any = LlamaForCausalLM(config)
        self.language = language
        self.language.load_state_dict(torch.load(FOLDER / "language.pt"))
        self.language.tie_weights()
        self.language.to(dtype).requires_grad_(False)
        for parent, name, layer in self._linears(nn.Linear):
            setattr(parent, name, Adapted(layer))
        self.tower = Lite0()
        width = config.hidden_size
        self.projector = nn.Sequential(nn.Linear(WIDTH, 1152), nn.GELU(), nn.Linear(1152, width))
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("deviation", torch.ones(WIDTH))
        self.scale = LENGTH * self.language.model.embed_tokens.weight.float().std().item()
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer")
        self.before = self.ids("<|im_start|>user\n")
        self.template = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.ids("<|im_end|>")

    def _linears(self, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
        found = []
        for layer in self.language.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                found += [(parent, *each) for each in parent.named_children()
                          if isinstance(each[1], kind)]  # fmt: skip
        return found

    def merge(self) -> None:
        """Merge the adapters into the language model, which is an ordinary Llama afterwards."""
        for parent, name, layer in self._linears(Adapted):
            setattr(parent, name, layer.merged())
        self.requires_grad_(False)

    def trained(self) -> dict[str, Tensor]:
        """Return what is not in the published parts."""
        ends = (".up", ".down", "mean", "deviation")
        return {
            name: value
            for name, value in self.state_dict().items()
            if name.startswith("projector.") or name.endswith(ends)
        }

    def load(self, path: Path) -> None:
        """Load what `trained` returned."""
        self.load_state_dict(torch.load(path), strict=False)

    def ids(self, text: str) -> list[int]:
        """Return token ids."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def question(self, text: str) -> list[int]:
        """Return the ids of a question, which follows the picture on a line of its own."""
        return self.ids(f"\n{text}")

    def words(self, ids: Sequence[int]) -> Tensor:
        """Return input embeddings, (L, D)."""
        return functional.embedding(torch.tensor(ids), self.language.model.embed_tokens.weight)

    def look(self, pictures: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """Return features with a deviation of 1, (B, N, `WIDTH`), and saliency, (B, N)."""
        pixels = torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2)
        features, saliency = self.tower((pixels - 127) / 128)
        return (features - self.mean) / self.deviation, saliency

    def project(self, features: Tensor) -> Tensor:
        """Return input embeddings of patches, (..., D)."""
        projected: Tensor = self.projector(features) * self.scale
        return projected.to(self.language.dtype)


@dataclass(frozen=True)
class Packed:
    """Questions about one picture in one prompt; each sees the picture and itself."""

    ids: list[int]
    """After the picture."""
    positions: list[int]
    groups: list[int]
    """0 up to the end of the picture, then the number of the question from 1."""
    targets: list[tuple[int, int]]
    """Place in the prompt, and id of the token that follows there."""
    lengths: list[int]
    """Tokens of each answer, with the end of the turn."""


def packed(model: RealVLM, patches: int, asked: Sequence[tuple[str, str]]) -> Packed:
    """Pack questions and their answers."""
    first = len(model.before) + patches
    own = Packed([], list(range(first)), [0] * first, [], [])
    for number, (text, answer) in enumerate(asked, 1):
        prompt = model.question(text) + model.template
        said = model.ids(answer) + model.end
        start = first + len(own.ids) + len(prompt) - 1
        own.targets.extend((start + step, token) for step, token in enumerate(said))
        own.lengths.append(len(said))
        ids = (prompt + said)[:-1]
        own.ids.extend(ids)
        own.positions.extend(range(first, first + len(ids)))
        own.groups.extend([number] * len(ids))
    return own


def logits(
    model: RealVLM, visual: Tensor, asked: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor, list[int]]:
    """Return logits of the answers' tokens, those tokens, and how many each answer has."""
    own = packed(model, len(visual), asked)
    groups = torch.tensor(own.groups)
    sees = (groups == 0) | (groups == groups[:, None])
    prompt = torch.cat([model.words(model.before), visual, model.words(own.ids)])
    hidden = run(model, prompt, torch.tensor(own.positions), sees)
    places, tokens = torch.tensor(own.targets).T
    return model.language.lm_head(hidden[places]).float(), tokens, own.lengths


def run(model: RealVLM, prompt: Tensor, positions: Tensor, sees: Tensor | None = None) -> Tensor:
    """Return the last hidden states of a prompt, (L, D).

    Args:
        model: the model.
        prompt: (L, D) input embeddings.
        positions: (L,) int64, with gaps where tokens are left out.
        sees: (L, L) bool, what each token sees of those before it; None: all.

    """
    # Without a mask of its own Transformers takes a gap in the positions for another prompt.
    shape = (len(prompt), len(prompt))
    allowed = torch.ones(shape, dtype=torch.bool).tril()
    allowed = allowed if sees is None else allowed & sees
    mask = prompt.new_zeros(shape).masked_fill(~allowed, -torch.inf)
    out = model.language.model(
        inputs_embeds=prompt[None],
        position_ids=positions[None],
        attention_mask=mask[None, None],
        use_cache=False,
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden
