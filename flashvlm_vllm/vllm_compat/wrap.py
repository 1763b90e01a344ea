# SPDX-License-Identifier: Apache-2.0
"""Wraps a method of vLLM: the original is always called, once per process, and never silently
over somebody else's change."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_WRAPPED = "__flashvlm_wrapped__"
_OF_VLLM = frozenset({"vllm", "torch", "contextlib", "functools"})
"""Packages whose functions stand in vLLM's classes: its own, and what its decorators come from."""


class Kind(StrEnum):
    """What a target is."""

    METHOD = "method"
    STATIC = "static method"
    CLASS = "class method"
    PROPERTY = "property"


class State(StrEnum):
    """What stands at a target now."""

    STOCK = "stock"
    WRAPPED = "wrapped"
    """By this plugin."""
    FOREIGN = "foreign"
    """Replaced by another package, which may or may not call what it replaced."""


@dataclass(frozen=True)
class Entry:
    """A change of vLLM's behaviour, and when it can go."""

    target: str
    """``module:Class.attribute``."""
    why: str
    """What is missing in vLLM, or what breaks without the change."""
    seen: str
    """The newest vLLM release in which that was found."""
    ends: str
    """What vLLM has to offer for the change to go."""
    link: str | None = None
    """vLLM's issue or pull request about it; ``None`` where none was found."""


@dataclass(frozen=True, kw_only=True)
class Wrap(Entry):
    """A method that is wrapped."""

    wrapper: Callable[..., Any]
    """Called with the original, then with its arguments."""
    kind: Kind = Kind.METHOD
    only_if_imported: bool = False
    """Of a module that only some processes import, and that must not be imported for this."""

    def apply(self) -> None:
        """Wrap the target, unless this process has done so.

        A target that another package has replaced is wrapped all the same, with a warning: this
        plugin's wrapper then calls that package's replacement.
        """
        owner, name = self._owner_and_name()
        if owner is None:
            return
        original = self._function(owner, name)
        state = _state(original)
        if state is State.WRAPPED:
            return
        if state is State.FOREIGN:
            from vllm.logger import init_logger

            # vLLM shows its own name space only.
            init_logger("vllm.flashvlm").warning(
                "flashvlm: %s was replaced by %s before; both changes apply. If requests fail, "
                "load one of the two plugins alone (VLLM_PLUGINS)",
                self.target,
                _package_of(original),
            )

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.wrapper(original, *args, **kwargs)

        setattr(wrapped, _WRAPPED, True)
        made: dict[Kind, Callable[[Any], Any]] = {
            Kind.METHOD: lambda function: function,
            Kind.STATIC: staticmethod,
            Kind.CLASS: classmethod,
            Kind.PROPERTY: property,
        }
        setattr(owner, name, made[self.kind](wrapped))

    def state(self) -> State | None:
        """Return what stands at the target; ``None`` where its module is not imported."""
        owner, name = self._owner_and_name()
        return None if owner is None else _state(self._function(owner, name))

    def _owner_and_name(self) -> tuple[Any, str]:
        module_name, _, path = self.target.partition(":")
        owner_name, _, name = path.rpartition(".")
        if self.only_if_imported:
            module: Any = sys.modules.get(module_name)
        else:
            module = importlib.import_module(module_name)
        return (None if module is None else getattr(module, owner_name)), name

    def _function(self, owner: Any, name: str) -> Any:
        found = getattr(owner, name)
        if self.kind is Kind.PROPERTY:
            return found.fget
        return found.__func__ if self.kind is Kind.CLASS else found


def apply_all(wraps: Iterable[Wrap]) -> None:
    """Wrap several targets."""
    for each in wraps:
        each.apply()


def _state(function: Any) -> State:
    if getattr(function, _WRAPPED, False):
        return State.WRAPPED
    return State.STOCK if _package_of(function) in _OF_VLLM else State.FOREIGN


def _package_of(function: Any) -> str:
    # Not `__module__`, which decorators copy from what they replace.
    name: str = getattr(function, "__globals__", {}).get("__name__", "an unknown package")
    return name.partition(".")[0]
