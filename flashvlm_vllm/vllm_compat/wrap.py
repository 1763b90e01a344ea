# SPDX-License-Identifier: Apache-2.0
"""Wraps methods of vLLM. A wrapper always calls the original; each target is wrapped once per
process, with a warning if another package has changed it."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_WRAPPED = "__flashvlm_wrapped__"
_OF_VLLM = frozenset({"vllm", "torch", "contextlib", "functools"})
"""Packages that define the functions in vLLM's classes: vLLM, and those its decorators are from."""


class Kind(StrEnum):
    """Kind of a target."""

    METHOD = "method"
    STATIC = "static method"
    CLASS = "class method"
    PROPERTY = "property"


class State(StrEnum):
    """State of a target."""

    STOCK = "stock"
    WRAPPED = "wrapped"
    """Wrapped by this plugin."""
    FOREIGN = "foreign"
    """Replaced by another package, which may or may not call the function that it replaced."""


@dataclass(frozen=True)
class Entry:
    """A change of vLLM's behaviour, and when it can be removed."""

    target: str
    """``module:Class.attribute``."""
    why: str
    """What is missing in vLLM, or what breaks without the change."""
    seen: str
    """The newest vLLM release in which this was observed."""
    ends: str
    """What vLLM must provide before the change can be removed."""
    link: str | None = None
    """vLLM's issue or pull request about it; ``None`` if none was found."""


@dataclass(frozen=True, kw_only=True)
class Wrap(Entry):
    """A method that is wrapped."""

    wrapper: Callable[..., Any]
    """Called with the original, then with its arguments."""
    kind: Kind = Kind.METHOD
    only_if_imported: bool = False
    """Wrap only if the process has imported the module; do not import it."""

    def apply(self) -> None:
        """Wrap the target, unless it is already wrapped in this process.

        A target that another package has replaced is wrapped too, with a warning: this plugin's
        wrapper then calls that package's replacement.
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

            # vLLM configures only its own loggers
            init_logger("vllm.flashvlm").warning(
                "flashvlm: %s was already replaced by %s; both changes apply. If requests fail, "
                "load only one of the two plugins (VLLM_PLUGINS)",
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
        """Return the state of the target; ``None`` if its module is not imported."""
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
    # Not `__module__`, which decorators copy from the function that they wrap.
    name: str = getattr(function, "__globals__", {}).get("__name__", "an unknown package")
    return name.partition(".")[0]
