# SPDX-License-Identifier: Apache-2.0
"""What the selection refuses. Looks at types, shapes and devices only, never at values."""

from __future__ import annotations

from torch import Tensor


def check_count(name: str, value: int) -> None:
    """A number of tokens.

    Args:
        name: of the argument, for the message.
        value: its value.

    Raises:
        TypeError: it is no int (a bool is refused too).
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; allowed: an int of at least 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; allowed: an int of at least 1")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor, least: int = 1
) -> None:
    """A floating-point tensor of a given shape.

    Args:
        name: of the argument, for the message.
        tensor: its value.
        shape: a number is that size exactly, a letter any size of at least `least`.
        like: the tensor whose device counts.
        least: smallest size behind a letter.

    Raises:
        TypeError: the tensor is not floating point.
        ValueError: shape or device do not fit.
    """
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        size >= least if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(given, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join(str(wanted) for wanted in shape) + ("," if len(shape) == 1 else "")
        letters = ", ".join(wanted for wanted in shape if isinstance(wanted, str))
        bound = f" with {letters} >= {least}" if letters else ""
        raise ValueError(f"{name} is {given}; allowed: ({sizes}){bound}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; allowed: a floating-point dtype")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}; allowed: {like.device}, the device of the features"
        )
