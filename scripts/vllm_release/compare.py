# SPDX-License-Identifier: Apache-2.0
"""Compares the used parts of two releases."""

import ast
import re
from dataclasses import dataclass, field

from scripts.vllm_release.sources import Found, Function, Sources
from scripts.vllm_release.surface import THEIRS, Surface

_DEFINED = re.compile(r"(?:def|class) (\w+)|\.(\w+)\s*(?::[^=\n]+)?=(?!=)|^\s+(\w+)\s*:", re.M)
"""Searching text shows that a name is not defined, a hundred times as fast as parsing."""


@dataclass
class Comparison:
    """The differences, the most important first."""

    symbols: int = 0
    names: int = 0
    unknown: list[str] = field(default_factory=list)
    """Not found in the release the plugin is written for: this script missed them."""
    missing: dict[str, str] = field(default_factory=dict)
    """Removed symbols, and how the plugin uses them."""
    signatures: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Changed parameters, before and after."""
    collisions: list[str] = field(default_factory=list)
    """Names of the plugin that classes of the other release define, but not of the first."""
    vanished: dict[str, list[str]] = field(default_factory=dict)
    """Attributes that the first release defines, and the other does not."""
    bodies: list[str] = field(default_factory=list)
    """Replaced or wrapped, with changed code: needs review."""

    @property
    def breaks(self) -> bool:
        """Whether the plugin is incompatible."""
        return bool(self.unknown or self.missing or self.collisions or self.breaking)

    @property
    def breaking(self) -> list[str]:
        """Symbols whose parameters changed other than by additional ones with a default."""
        return [
            symbol
            for symbol, (before, after) in self.signatures.items()
            if not _is_extension(before, after)
        ]


def compare(surface: Surface, first: Sources, other: Sources) -> Comparison:
    """Compare the used symbols of the first release with the other release."""
    result = Comparison(symbols=len(surface.symbols))
    for symbol, how in sorted(surface.symbols.items()):
        before, after = find(first, symbol), find(other, symbol)
        if before is None:
            result.unknown.append(symbol)
        elif after is None:
            result.missing[symbol] = ", ".join(sorted(how))
        else:
            is_class = isinstance(before.node, ast.ClassDef)
            if is_class and not isinstance(after.node, ast.ClassDef):
                result.missing[symbol] = "no longer a class"
            elif is_class:
                _compare_calls(result, symbol, surface.keywords.get(symbol, set()), other, after)
            else:
                _compare_definitions(result, symbol, how, (first, before), (other, after))
    for base, own in sorted(surface.own.items()):
        before, after = find(first, base), find(other, base)
        if before and after:
            result.collisions += [
                f"{base}.{name}"
                for name in sorted(own)
                if other.member(after, name) and not first.member(before, name)
            ]
    defined, still = attributes(first), attributes(other)
    ours = {name for names in surface.own.values() for name in names}
    for name, users in sorted(surface.loose.items()):
        if name in defined and name not in ours:
            result.names += 1
            if name not in still:
                result.vanished[name] = sorted(users)
    return result


def find(sources: Sources, symbol: str) -> Found | None:
    """Find ``module``, ``module:name`` or ``module:Class.attribute``."""
    module, _, path = symbol.partition(":")
    if not path:
        tree = sources.tree(module)
        return Found(module, "", tree) if tree else None
    name, *rest = path.split(".")
    found = sources.resolve(module, name)
    for attribute in rest:
        if found is None:
            return None
        if isinstance(found.node, ast.Module):
            found = sources.resolve(found.module, attribute)
        else:
            found = sources.member(found, attribute)
    return found


def attributes(sources: Sources) -> set[str]:
    """Return all names of functions, classes, attributes and fields in vLLM."""
    folder = sources.folders[THEIRS]
    return {
        name
        for path in folder.rglob("*.py")
        for names in _DEFINED.findall(path.read_text())
        for name in names
        if name
    }


def signature(sources: Sources, found: Found) -> str | None:
    """Return a function's parameters, or those of a class's constructor."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        made = sources.member(found, "__init__")
        if made is not None and isinstance(made.node, Function):
            return signature(sources, made)
        if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            return ", ".join(
                f"{ast.unparse(each.target)}{'=…' if each.value else ''}" for each in fields
            )
        return None
    if not isinstance(node, Function):
        return None
    taken = node.args
    positional = [*taken.posonlyargs, *taken.args]
    without = len(positional) - len(taken.defaults)
    written = [
        f"{each.arg}{'=…' if number >= without else ''}" for number, each in enumerate(positional)
    ]
    if taken.vararg:
        written.append(f"*{taken.vararg.arg}")
    elif taken.kwonlyargs:
        written.append("*")
    written += [
        f"{each.arg}{'=…' if default else ''}"
        for each, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)
    ]
    if taken.kwarg:
        written.append(f"**{taken.kwarg.arg}")
    kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    kinds = [ast.unparse(each) for each in node.decorator_list]
    kept = [each for each in kinds if each in ("property", "classmethod", "staticmethod")]
    return f"{' '.join((*kept, kind)).strip()}({', '.join(written)})"


def _compare_definitions(
    result: Comparison,
    symbol: str,
    how: set[str],
    first: tuple[Sources, Found],
    other: tuple[Sources, Found],
) -> None:
    before, after = signature(*first), signature(*other)
    if before != after and before is not None:
        result.signatures[symbol] = (before, str(after))
    elif how & {"replaced", "wrapped"} and _text(first[1]) != _text(other[1]):
        result.bodies.append(symbol)


def _compare_calls(
    result: Comparison, symbol: str, keywords: set[str], sources: Sources, found: Found
) -> None:
    """Check that a class still accepts the arguments that are passed by name.

    A constructor that is replaced or called through ``super()`` is a symbol of its own.
    """
    taken = signature(sources, found)
    if taken is not None and "**" not in taken:
        names = {each.removesuffix("=…") for each in _parameters(taken)}
        result.missing |= {f"{symbol}({each}=)": "passed by name" for each in keywords - names}


def _text(found: Found) -> str:
    return ast.dump(found.node) if not isinstance(found.node, ast.Module) else ""


def difference(before: str, after: str) -> str:
    """Return removed and added parameters."""
    old, new = _parameters(before), _parameters(after)
    gone = [f"-{each}" for each in old if each not in new]
    return " ".join(gone + [f"+{each}" for each in new if each not in old]) or f"order: {after}"


def _is_extension(before: str, after: str) -> bool:
    old, new = _parameters(before), _parameters(after)
    added = [each for each in new if each not in old and each != "*"]
    kept = [each for each in new if each in old]
    return kept == old and all("=…" in each for each in added)


def _parameters(text: str) -> list[str]:
    return text.strip("()").split(", ")
