# SPDX-License-Identifier: Apache-2.0
"""A model's inputs, item by item: how vLLM's batch of them is split and put together again.

vLLM puts the inputs of several items into one call. The API process knows how they were put
together and sends it along, so that the worker can encode some of the items.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    BaseMultiModalField,
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalSharedField,
)

_BATCHED, _FLAT, _SHARED = range(3)


def layout_of(item: Mapping[str, MultiModalFieldElem]) -> Tensor:
    """Return how each input of an item is put together, ``(3 K,)`` int64 by sorted names.

    Args:
        item: a processed item of vLLM's.

    """
    rows: list[tuple[int, int, int]] = []
    for _, elem in sorted(item.items()):
        if isinstance(elem.field, MultiModalFlatField):
            size = len(elem.data) if elem.field.dim == 0 else elem.data.shape[elem.field.dim]  # type: ignore[union-attr]
            rows.append((_FLAT, elem.field.dim, size))
        else:
            shared = isinstance(elem.field, MultiModalSharedField)
            rows.append((_SHARED if shared else _BATCHED, 0, 0))
    return torch.tensor(rows, dtype=torch.int64).flatten()


def split(kwargs: Mapping[str, Any], layouts: Sequence[Tensor]) -> list[MultiModalKwargsItem]:
    """Return each item of a call.

    Args:
        kwargs: the model inputs of all items.
        layouts: results of `layout_of`, one per item.

    """
    names = sorted(kwargs)
    starts = dict.fromkeys(names, 0)
    items = []
    for number, layout in enumerate(layouts):
        elems = {}
        rows = layout.view(-1, 3).tolist()
        for name, (kind, dim, size) in zip(names, rows, strict=True):
            value = kwargs[name]
            field: BaseMultiModalField = MultiModalBatchedField()
            if kind == _SHARED:
                own, field = value, MultiModalSharedField(batch_size=1)
            elif kind == _BATCHED:
                own = value[number]
            else:
                start = starts[name]
                starts[name] += size
                field = MultiModalFlatField(slices=[], dim=dim)
                is_list = not isinstance(value, Tensor)
                own = value[start : start + size] if is_list else value.narrow(dim, start, size)
            elems[name] = MultiModalFieldElem(data=own, field=field)
        items.append(MultiModalKwargsItem(elems))
    return items


def together(items: Sequence[MultiModalKwargsItem]) -> dict[str, Any]:
    """Return the model inputs of some items, as vLLM puts them together."""
    return {
        name: items[0][name].field.reduce_data([each[name] for each in items]) for name in items[0]
    }
