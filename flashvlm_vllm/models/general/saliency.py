# SPDX-License-Identifier: Apache-2.0
"""Saliency from the last encoder attention that is seen while a model encodes its items."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isqrt

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from flashvlm_vllm.vision.attention import cls_attention, received_attention

Inputs = tuple[Tensor, ...]
Named = dict[str, Tensor]
Call = tuple[Tensor, Tensor, Tensor | None]
"""Query and key, ``(B, T, H, d)``, and the bounds of the sequences packed into ``T``, if any."""


class LastAttention:
    """The attention module of a model's encoder that is called last."""

    def __init__(self, modules: Iterable[nn.Module], ranks: int = 1) -> None:
        """Look among all modules of a model; which of them is the last is learnt from a run.

        Args:
            modules: the modules.
            ranks: number of tensor parallel ranks, which have some of the heads or all of them.

        """
        self._ranks = ranks
        every = list(modules)
        self._modules = [each for each in every if isinstance(each, MMEncoderAttention)]
        if any(hasattr(each, "get_window_index") for each in every):
            self._modules = []  # the tower reorders patches by windows
        # Towers like Qwen2-VL's pack the patches of a token one after another.
        self._packs_squares = any(
            hasattr(each, "spatial_merge_size") and hasattr(each, "rot_pos_emb") for each in every
        )
        self._last: MMEncoderAttention | None = None
        self.was_mapped = False
        """Whether the patches of the latest items could be assigned to tokens."""

    @property
    def is_known(self) -> bool:
        """Whether the last module is known, or there is none."""
        return self._last is not None or not self._modules

    @contextmanager
    def learn(self) -> Iterator[None]:
        """Note which module is called last inside the block."""
        called: list[nn.Module] = []

        def hook(module: nn.Module, inputs: Inputs, named: Named) -> None:
            given = _named(inputs, named)
            # A pooling layer asks with fewer queries than there are patches.
            if given["query"].shape == given["key"].shape:
                called.append(module)

        handles = [each.register_forward_pre_hook(hook, with_kwargs=True) for each in self._modules]
        try:
            yield
        finally:
            for each in handles:
                each.remove()
        last = called[-1] if called else None
        self._last = last if isinstance(last, MMEncoderAttention) else None
        if last is None:
            self._modules = []

    @contextmanager
    def listen(self) -> Iterator[list[Call]]:
        """Collect queries and keys of each call of the last module inside the block."""
        calls: list[Call] = []
        if self._last is None:
            yield calls
            return
        size = self._last.head_size

        def hook(module: nn.Module, inputs: Inputs, named: Named) -> None:
            given = _named(inputs, named)
            query, key = (
                given[name].reshape(*given[name].shape[:2], -1, size) for name in ("query", "key")
            )
            calls.append((query, key, given.get("cu_seqlens")))

        handle = self._last.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def of_tokens(self, calls: Sequence[Call], sizes: Sequence[int]) -> list[Tensor] | None:
        """Return the saliency of the tokens of each item, ``(n_i,)`` float32.

        Args:
            calls: result of `listen`, the patches of all items in order.
            sizes: number of tokens of each item.

        Returns:
            ``None`` if patches cannot be assigned: a token must be one patch, or a square of them,
            of a square image or packed square by square.

        """
        found = self._of_tokens(calls, sizes)
        self.was_mapped = found is not None
        return found

    def _of_tokens(self, calls: Sequence[Call], sizes: Sequence[int]) -> list[Tensor] | None:
        tokens, attention = sum(sizes), self._last
        if attention is None or not calls or not tokens:
            return None
        with gpu_sync_allowed():
            pairs = [pair for call in calls for pair in _sequences(*call)]
        patches = sum(query.shape[0] * query.shape[1] for query, _ in pairs)
        images = sum(query.shape[0] for query, _ in pairs)
        is_packed = any(bounds is not None for _, _, bounds in calls)
        side, has_cls = isqrt(patches // tokens), False
        if side * side * tokens != patches:
            side, has_cls = isqrt((patches - images) // tokens), True
        if not side or side * side * tokens + has_cls * images != patches:
            return None
        attend = cls_attention if has_cls else received_attention
        pooled = []
        for query, key in pairs:
            own = attend(query, key, attention.scale)[:, int(has_cls) :]
            if side > 1:
                if is_packed and not self._packs_squares:
                    return None
                squares = _packed_squares(own, side) if is_packed else _squares(own, side)
                if squares is None:
                    return None
                own = squares
            pooled.append(own.flatten())
        summed = torch.cat(pooled)
        if self._ranks > 1:
            summed = tensor_model_parallel_all_reduce(summed)
        return list((summed / (attention.num_heads * self._ranks)).split(list(sizes)))


def _named(inputs: Inputs, named: Named) -> Named:
    """Return the inputs of an attention module by name."""
    return dict(zip(("query", "key", "value", "cu_seqlens"), inputs, strict=False)) | named


def _sequences(query: Tensor, key: Tensor, bounds: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Return queries and keys that attend to one another, ``(b, t, H, d)`` each."""
    if bounds is None:
        return [(query, key)]
    lengths = bounds.diff().tolist()
    flat = query.flatten(0, 1), key.flatten(0, 1)
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        return [(flat[0].unflatten(0, shape), flat[1].unflatten(0, shape))]
    parts = zip(*(each.split(lengths) for each in flat), strict=True)
    return [(one[None], other[None]) for one, other in parts if len(one)]


def _packed_squares(values: Tensor, side: int) -> Tensor | None:
    """Average adjacent patches, ``(b, t)``, each token's together."""
    if values.shape[1] % (side * side):
        return None
    pooled: Tensor = values.unflatten(1, (-1, side * side)).mean(dim=2)
    return pooled


def _squares(values: Tensor, side: int) -> Tensor | None:
    """Average squares of patches of square images, ``(b, t)``, in raster order."""
    wide = isqrt(values.shape[1])
    if wide * wide != values.shape[1] or wide % side:
        return None
    rows = values.view(len(values), wide // side, side, wide // side, side)
    pooled: Tensor = rows.mean(dim=(2, 4)).flatten(1)
    return pooled
