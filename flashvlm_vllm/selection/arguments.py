# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the selection. They use types, shapes and devices only, never values."""

from __future__ import annotations

from torch import Tensor


def check_count(name: str, value: int) -> None:
    """Check a number of tokens.

    Args:
        name: name of the argument, for the message.
        value: its value.

    Raises:
        TypeError: it is not an int (a bool is refused too).
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; allowed: an int of at least 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; allowed: an int of at least 1")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor, least: int = 1
) -> None:
    """Check a floating-point tensor of a given shape.

    Args:
        name: name of the argument, for the message.
        tensor: its value.
        shape: a number means exactly that size, a letter any size of at least `least`.
        like: a tensor on the required device.
        least: smallest size for a letter.

    Raises:
        TypeError: the tensor is not floating point.
        ValueError: the shape or the device is not as required.
    """
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        size >= least if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(given, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        letters = ", ".join(size for size in shape if isinstance(size, str))
        bound = f" with {letters} >= {least}" if letters else ""
        raise ValueError(f"{name} is {given}; allowed: ({sizes}){bound}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; allowed: a floating-point dtype")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}; allowed: {like.device}, the device of the features"
        )
