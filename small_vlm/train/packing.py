# SPDX-License-Identifier: Apache-2.0
"""Many questions after one picture, in one pass, each as if it were the only one.

    user : <picture> | what color is the ring ? assistant : red </s>
                     | is there a blue disc ? assistant : no </s>
                     | ...

Every branch sees the picture and itself, and its positions begin where the picture ends, so the
model trains on exactly the prompts it is served with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from small_vlm.checkpoint import EOS, PAD
from small_vlm.train.attention import packed_attention

IGNORED = -100


@dataclass(frozen=True)
class Branches:
    """A batch of branches that follow prefixes; at most ``S`` tokens each."""

    ids: Tensor
    """(B, S) int64."""
    labels: Tensor
    """(B, S): the token to predict at each place, -100 where nothing is asked."""
    weights: Tensor
    """(B, S): how much each prediction counts."""
    positions: Tensor
    """(B, S): counted from the end of the prefix, in each branch."""
    branch: Tensor
    """(B, S): number of the branch; -1 for padding."""


def pack(tokenizer: Any, batch: Sequence[Sequence[tuple[str, str, float]]]) -> Branches:
    """Concatenate branches, ``(question, answer, weight)`` each."""
    rows = []
    for branches in batch:
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        positions: list[int] = []
        numbers: list[int] = []
        for number, (question, answer, weight) in enumerate(branches):
            asked = encode(tokenizer, f"{question} ASSISTANT:")
            said = [*encode(tokenizer, answer), EOS]
            whole = asked + said
            ids += whole
            labels += [IGNORED] * (len(asked) - 1) + said + [IGNORED]
            weights += [weight / len(said)] * len(whole)
            positions += range(len(whole))
            numbers += [number] * len(whole)
        rows.append((ids, labels, weights, positions, numbers))
    longest = max(len(row[0]) for row in rows)
    fills = (PAD, IGNORED, 0.0, 0, -1)
    columns = [
        torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in rows])
        for part, fill in enumerate(fills)
    ]
    return Branches(*columns)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise without special tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def answer_loss(model: Any, prefix: Tensor, lengths: Tensor, packed: Branches) -> dict[str, Tensor]:
    """Run the language model and score the answers.

    Args:
        model: a LLaVA.
        prefix: ``(B, P, D)`` embeddings of "user :" and the picture, padded at the end.
        lengths: ``(B,)`` how many of them are real.
        packed: the branches.

    Returns:
        the loss, and the share of first answer tokens that are right.

    """
    count, reach = prefix.shape[:2]
    size = packed.ids.shape[1]
    language = model.model.language_model
    embeddings = torch.cat([prefix, language.embed_tokens(packed.ids)], dim=1)
    places = torch.arange(reach)
    positions = torch.cat([places.expand(count, -1), lengths[:, None] + packed.positions], dim=1)

    real = places < lengths[:, None]
    sees = torch.zeros(count, size, reach + size, dtype=torch.bool)
    sees[:, :, :reach] = real[:, None]
    same = packed.branch[:, :, None] == packed.branch[:, None]
    sees[:, :, reach:] = same & torch.ones(size, size, dtype=torch.bool).tril()
    sees[:, :, reach:] |= torch.eye(size, dtype=torch.bool)

    mask = torch.zeros(sees.shape).masked_fill_(~sees, -1e9)
    with packed_attention(language):
        states = language(
            inputs_embeds=embeddings,
            attention_mask=mask[:, None],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, reach:]
    chosen = packed.labels != IGNORED
    logits = model.lm_head(states[chosen])
    labels, weights = packed.labels[chosen], packed.weights[chosen]
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = (loss * weights).sum() / weights.sum()
    with torch.no_grad():
        before = packed.labels.roll(1, dims=1)
        before[:, 0] = IGNORED
        first = (packed.labels != IGNORED) & (before == IGNORED)
        right = (logits.argmax(-1) == labels)[first[chosen]]
    return {"loss": loss, "right": right.float().mean()}
