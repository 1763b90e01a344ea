# SPDX-License-Identifier: Apache-2.0
"""Writes the architecture page's diagram and modules, and the compatibility page's wraps.

``python -m scripts.architecture`` makes them from the source. A test fails while a page differs.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from flashvlm_vllm.vllm_compat.ledger import as_table
from scripts.pages import with_part

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flashvlm_vllm"
PAGE = ROOT / "docs" / "contributors" / "architecture.md"
COMPATIBILITY = ROOT / "docs" / "contributors" / "compatibility.md"

ROOMS = {
    "plugin": "entry point: models, flags",
    "endpoint": "entry point: routes",
    "cli": "the flashvlm command",
    "token_costs": "counts for routers",
    "vllm_compat": "every wrap of vLLM",
    "explain": "why tokens were kept",
    "serving": "requests and responses",
    "processing": "counts, identities, placeholders",
    "models": "one adapter per family",
    "worker": "the driver of all families",
    "vision": "saliency by vision tower",
    "selection": "the method, other selectors",
    "ipc": "API process to worker",
    "request": "what a client may ask",
    "settings": "what a server is started with",
    "supported_models": "covered architectures",
    "vllm_releases": "supported releases",
    "position_scheme": "rotary positions of a model",
    "language_models": "types whose first layers selectors can use",
    "lru": "bounded containers",
}
"""Rooms of the package from the top down: folders, and files at its root."""


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return the modules of the package that each of them imports, in functions too."""
    paths = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    found = {}
    for module, path in paths.items():
        names = {name for name in names_of(ast.parse(path.read_text())) if name in paths}
        # `from package.room import module` names the room, too.
        found[module] = frozenset(
            name
            for name in names - {module}
            if not any(other.startswith(f"{name}.") for other in names)
        )
    return found


def room_of(module: str) -> str:
    """Return the room of a module; the package itself has none."""
    return module.split(".")[1] if "." in module else ""


def room_imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, targets in imports().items():
        if room := room_of(module):
            graph[room] |= {room_of(each) for each in targets} - {room, ""}
    return graph


def diagram() -> str:
    """Return the imports between rooms as a Mermaid diagram.

    An arrow is left out where a chain of others says the same.
    """
    graph = room_imports()
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {room}["<b>{room}</b><br/>{text}"]' for room, text in ROOMS.items()]
    for room in ROOMS:
        reached = {far for near in graph[room] for far in _reached(graph, near)}
        direct = graph[room] - reached
        lines += [f"    {room} --> {each}" for each in ROOMS if each in direct]
    # The models are named in a table, and imported on first use.
    lines.append("    supported_models -. by name .-> models")
    return "\n".join([*lines, "```"])


def modules() -> str:
    """Return one line a module: the first of its docstring."""
    lines = []
    for room in ROOMS:
        own = [module for module in imports() if room_of(module) == room]
        lines += ["", f"**{room}**: {ROOMS[room]}", "", "| module | content |", "|---|---|"]
        for module in own:
            path = _path(module)
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            if path.name == "__init__.py" and len(own) > 1 and not _defines(path):
                continue
            name = path.relative_to(PACKAGE)
            link = f"[`{name}`](../../{path.relative_to(ROOT)})"
            lines.append(f"| {link} | {_first_sentence(text)} |")
    return "\n".join(lines).strip()


def page() -> str:
    """Return the page with both parts made from the source."""
    text = with_part(PAGE.read_text(), "diagram", diagram())
    return with_part(text, "modules", modules())


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_of(tree: ast.Module) -> Iterator[str]:
    """Yield every module that a file imports, and every name it imports of one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _reached(graph: dict[str, set[str]], room: str) -> set[str]:
    found: set[str] = set()
    waiting = [room]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _defines(path: Path) -> bool:
    """Return whether a package's own file has more than a docstring."""
    return len(ast.parse(path.read_text()).body) > 1


def _first_sentence(docstring: str) -> str:
    first = " ".join(docstring.split("\n\n")[0].split())
    return first.replace("|", "\\|").replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page())
    COMPATIBILITY.write_text(with_part(COMPATIBILITY.read_text(), "wraps", as_table()))
