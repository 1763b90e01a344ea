# SPDX-License-Identifier: Apache-2.0
"""Finds symbols in Python sources by following imports and base classes; imports nothing."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """A definition: its module and its node; of a module, its ``ast.Module``."""

    module: str
    name: str
    node: ast.AST

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    def __str__(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module


class Sources:
    """Packages by name, each in its folder."""

    def __init__(self, **folders: Path) -> None:
        self.folders = folders
        # Methods that are called often; one instance exists as long as the program runs.
        self.tree = cache(self._tree)
        self.names = cache(self._names)
        self.resolve = cache(self._resolve)
        self.ancestors = cache(self._ancestors)
        self.members = cache(self._members)

    def path(self, module: str) -> Path | None:
        top, *rest = module.split(".")
        if top not in self.folders:
            return None
        place = self.folders[top].joinpath(*rest)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def _tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return ast.parse(path.read_text()) if path else None

    def module_of(self, importer: str, node: ast.ImportFrom) -> str:
        """Return the full name of the module that an ``import from`` names."""
        if not node.level:
            return node.module or ""
        path = self.path(importer)
        is_package = path is not None and path.name == "__init__.py"
        parts = importer.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _names(self, module: str) -> dict[str, ast.AST]:
        """Map what a module defines or imports at its top level, in ``if`` and ``try`` too."""
        tree = self.tree(module)
        found: dict[str, ast.AST] = {}
        for node in _top_level(tree.body if tree else []):
            for name in _bound(node):
                # `if TYPE_CHECKING` and the first branch of a `try` have the real definition.
                found.setdefault(name, node)
        return found

    def _resolve(self, module: str, name: str) -> Found | None:
        """Find a module's attribute, where it is defined; ``None`` if there is none.

        What a package outside of these sources defines is found where it is imported.
        """
        node = self.names(module).get(name)
        if isinstance(node, ast.ImportFrom):
            origin = self.module_of(module, node)
            real = next(each.name for each in node.names if (each.asname or each.name) == name)
            if origin.split(".")[0] not in self.folders:
                return Found(module, name, node)
            return None if (origin, real) == (module, name) else self.resolve(origin, real)
        if isinstance(node, ast.Import):
            return Found(module, name, node)
        if node is not None:
            return Found(module, name, node)
        submodule = self.tree(f"{module}.{name}")
        if submodule is not None:
            return Found(f"{module}.{name}", "", submodule)
        for node in _top_level(getattr(self.tree(module), "body", [])):
            if isinstance(node, ast.ImportFrom) and any(each.name == "*" for each in node.names):
                found = self.resolve(self.module_of(module, node), name)
                if found:
                    return found
        return self._lazy(module, name)

    def _lazy(self, module: str, name: str) -> Found | None:
        """Find a result of ``__getattr__`` in a table of ``name: ".module:name"``."""
        if "__getattr__" not in self.names(module):
            return None
        for node in ast.walk(self.tree(module) or ast.Module([], [])):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name:
                        target = value.value if isinstance(value, ast.Constant) else None
                        if isinstance(target, str) and re.fullmatch(r"\.[\w.]+:\w+", target):
                            place, attribute = target.split(":")
                            return self.resolve(module + place, attribute)
                        return Found(module, name, value)
        return None

    def expression(self, module: str, node: ast.AST) -> Found | None:
        """Find the definition of a dotted name in a module's source."""
        if isinstance(node, ast.Subscript):
            return self.expression(module, node.value)
        if isinstance(node, ast.Name):
            return self.resolve(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.expression(module, node.value)
            if owner is not None and isinstance(owner.node, ast.Module):
                return self.resolve(owner.module, node.attr)
        return None

    def _ancestors(self, module: str, name: str) -> tuple[Found, ...]:
        """List a class and its base classes, each once, nearest first as Python would look."""
        first = self.resolve(module, name)
        if first is None or not isinstance(first.node, ast.ClassDef):
            return ()
        lines = []
        for base in first.node.bases:
            found = self.expression(first.module, base)
            if found is not None and found.is_class:
                lines.append(list(self.ancestors(found.module, found.name)))
        return (first, *_merged(lines))

    def _members(self, module: str, name: str) -> dict[str, ast.AST]:
        """Map what one class defines itself, attributes that its methods set included."""
        found = self.resolve(module, name)
        members: dict[str, ast.AST] = {}
        if found is None or not isinstance(found.node, ast.ClassDef):
            return members
        for node in _top_level(found.node.body):
            for bound in _bound(node):
                members[bound] = node  # the last of several overloads is the function itself
        for each in ast.walk(found.node):
            if (
                isinstance(each, ast.Attribute)
                and isinstance(each.ctx, ast.Store)
                and isinstance(each.value, ast.Name)
                and each.value.id == "self"
            ):
                members.setdefault(each.attr, each)
        return members

    def member(self, owner: Found, name: str) -> Found | None:
        """Find an attribute of a class, inherited ones included, or of a class's only instance."""
        if isinstance(owner.node, ast.Assign) and isinstance(owner.node.value, ast.Call):
            made = self.expression(owner.module, owner.node.value.func)
            return self.member(made, name) if made is not None and made.is_class else None
        for each in self.ancestors(owner.module, owner.name):
            node = self.members(each.module, each.name).get(name)
            if node is not None:
                return Found(each.module, f"{each.name}.{name}", node)
        return None


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            for handler in getattr(node, "handlers", []):
                inner += handler.body
            yield from _top_level(inner)
        else:
            yield node


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, (*Function, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Import):
        return [each.asname or each.name.split(".")[0] for each in node.names]
    if isinstance(node, ast.ImportFrom):
        return [each.asname or each.name for each in node.names if each.name != "*"]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [
        name.id
        for target in targets
        for name in (target.elts if isinstance(target, ast.Tuple) else [target])
        if isinstance(name, ast.Name)
    ]


def _merged(lines: list[list[Found]]) -> list[Found]:
    """Merge the bases' lines as Python's method resolution order does (C3)."""
    order: list[Found] = []
    lines = [line for line in lines if line]
    while lines:
        for line in lines:
            if not any(line[0] in other[1:] for other in lines):
                break
        else:
            line = lines[0]  # not a class that Python would accept; any order will do
        head = line[0]
        order.append(head)
        lines = [rest for each in lines if (rest := [found for found in each if found != head])]
    return order
