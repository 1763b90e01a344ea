# SPDX-License-Identifier: Apache-2.0
"""The parts of vLLM that this plugin uses, read from its source.

Five kinds of use: importing; an attribute of something imported; a target in a string,
``"vllm.module:Class.method"``; replacing a method of a base class; using what a derived class
inherits. Attributes of objects whose class is not known from the source (``request.metadata``) are
recorded by name only.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from scripts.vllm_release.sources import Found, Function, Sources

OURS = "flashvlm_vllm"
THEIRS = "vllm"
_TARGET = re.compile(rf"(?P<module>{THEIRS}(\.\w+)+):(?P<owner>\w+)(\.(?P<name>\w+))?")


@dataclass
class Surface:
    """The used symbols, and how: ``imported``, ``called``, ``replaced`` and so on."""

    symbols: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By ``module:name`` or ``module:Class.attribute``."""
    keywords: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By called symbol, the arguments that are passed by name."""
    loose: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Attributes of objects of unknown class, with the modules that use them."""
    own: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By ``module:Class`` of vLLM, the names that derived classes of the plugin define."""


def read(sources: Sources, modules: list[str]) -> Surface:
    """Read the plugin's modules; ``sources`` has them and the vLLM that they are written for."""
    surface = Surface()
    for module in modules:
        tree = sources.tree(module)
        assert tree is not None, module
        for node in ast.walk(tree):
            _imports(sources, surface, module, node)
        for scope in _scopes(tree):
            _attributes(sources, surface, module, scope)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                _class(sources, surface, module, node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                _target(surface, node.value)
    return surface


def _target(surface: Surface, text: str) -> None:
    """Record a string that names a class of vLLM's, or an attribute of one."""
    found = _TARGET.fullmatch(text)
    if found is not None:
        surface.symbols[f"{found['module']}:{found['owner']}"].add("imported")
        if found["name"]:
            surface.symbols[text].add("wrapped")


def _imports(sources: Sources, surface: Surface, module: str, node: ast.AST) -> None:
    if isinstance(node, ast.ImportFrom):
        origin = sources.module_of(module, node)
        if origin.split(".")[0] == THEIRS:
            for each in node.names:
                surface.symbols[f"{origin}:{each.name}"].add("imported")
    elif isinstance(node, ast.Import):
        for each in node.names:
            if each.name.split(".")[0] == THEIRS:
                surface.symbols[each.name].add("imported")


def _scopes(tree: ast.Module) -> Iterator[tuple[list[ast.stmt], list[ast.ImportFrom | ast.Import]]]:
    """Yield each function's body, and the module's, with the imports that hold in it."""
    outer = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    yield tree.body, outer
    for node in ast.walk(tree):
        if isinstance(node, Function):
            inner = [
                each for each in ast.walk(node) if isinstance(each, ast.ImportFrom | ast.Import)
            ]
            if inner:
                yield node.body, [*outer, *inner]


def _attributes(
    sources: Sources,
    surface: Surface,
    module: str,
    scope: tuple[list[ast.stmt], list[ast.ImportFrom | ast.Import]],
) -> None:
    body, imports = scope
    known = {
        each.asname or each.name: f"{sources.module_of(module, node)}:{each.name}"
        for node in imports
        if isinstance(node, ast.ImportFrom)
        and sources.module_of(module, node).split(".")[0] == THEIRS
        for each in node.names
    } | {
        each.asname: each.name
        for node in imports
        if isinstance(node, ast.Import)
        for each in node.names
        if each.asname and each.name.split(".")[0] == THEIRS
    }
    walked = [node for statement in body for node in ast.walk(statement)]
    for node in walked:
        # `serve = sys.modules.get("vllm...")`
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            for value in node.value.args:
                name = value.value if isinstance(value, ast.Constant) else None
                if not isinstance(name, str) or not name.startswith(f"{THEIRS}."):
                    continue
                if sources.path(name) and isinstance(node.targets[0], ast.Name):
                    known[node.targets[0].id] = name
                    surface.symbols[name].add("named")
    for node in walked:
        if isinstance(node, ast.Attribute):
            owner = _symbol(node.value, known)
            if owner is None:
                surface.loose[node.attr].add(module)
            elif not isinstance(node.ctx, ast.Store):
                surface.symbols[_below(owner, node.attr)].add("named")
        elif isinstance(node, ast.Call):
            called = _symbol(node.func, known)
            if called is not None:
                surface.symbols[called].add("called")
                surface.keywords[called] |= {each.arg for each in node.keywords if each.arg}
            # `_wrap(Class, "method", ...)`, `getattr(thing, "name", ...)`
            match node.args:
                case [first, ast.Constant(value=str(name)), *_] if name.isidentifier():
                    owner = _symbol(first, known)
                    if owner is not None:
                        surface.symbols[_below(owner, name)].add("wrapped")
                    else:
                        surface.loose[name].add(module)


def _symbol(node: ast.AST, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _symbol(node.value, known)
        # What an attribute of a class holds, its source does not say.
        symbol = _below(owner, node.attr) if owner else ""
        return None if "." in symbol.partition(":")[2] else symbol or None
    return None


def _below(owner: str, name: str) -> str:
    return f"{owner}.{name}" if ":" in owner else f"{owner}:{name}"


def _class(sources: Sources, surface: Surface, module: str, node: ast.ClassDef) -> None:
    """Record what a class replaces and inherits of vLLM's, on behalf of its mixins as well."""
    line = sources.ancestors(module, node.name)
    ours = [each for each in line if each.module.split(".")[0] == OURS]
    theirs = [each for each in line if each.module.split(".")[0] == THEIRS]
    bases = [each for each in theirs if not _is_below(sources, each, theirs)]
    defined = {
        name
        for each in ours
        for name, place in sources.members(each.module, each.name).items()
        # `name: Any` declares an attribute of vLLM's class for a type checker.
        if not (isinstance(place, ast.AnnAssign) and place.value is None)
    }
    used = {name for each in ours for name in _uses(each.node)}
    for base in bases:
        surface.own[str(base)] |= defined
        for name in defined:
            is_hidden = name.startswith("__") and name != "__init__"
            if not is_hidden and sources.member(base, name):
                surface.symbols[f"{base}.{name}"].add("replaced")
        for name in used - defined:
            if sources.member(base, name):
                surface.symbols[f"{base}.{name}"].add("inherited")


def _is_below(sources: Sources, found: Found, others: list[Found]) -> bool:
    return any(
        found != other and found in sources.ancestors(other.module, other.name) for other in others
    )


def _uses(node: ast.AST) -> Iterator[str]:
    """Yield what a class asks of ``self`` and ``super()``."""
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute):
            owner = each.value
            is_super = (
                isinstance(owner, ast.Call)
                and isinstance(owner.func, ast.Name)
                and owner.func.id == "super"
            )
            if is_super or (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                yield each.attr
