# SPDX-License-Identifier: Apache-2.0
"""Fills a table of the paper through lmms-eval: one run per task, budget and selector.

From the repository root: ``python -m benchmarks.public.run --table 1 --server http://localhost:8000``.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.folders import scratch
from benchmarks.public.cells import Target, plan, settings
from benchmarks.public.figures import as_json, markdown
from benchmarks.public.tables import TABLES
from flashvlm_vllm.request.budget import Budget, parse_budget_text
from flashvlm_vllm.request.selector_name import DEFAULT_SELECTOR, parse_selector

NEEDED = ("lmms-eval", "flashvlm-lmms-eval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells; write and print the table; return 1 when a cell failed."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    table = TABLES[asked.table]
    rows = settings(asked.budgets or table.budgets, asked.selectors)
    target = Target(asked.server, asked.llm or asked.model, asked.model_args)
    folder = (asked.output or scratch("public") / f"table-{asked.table}").resolve()
    if "," in str(folder):
        parser.error(f"--output: lmms-eval's arguments end at a comma; got {folder}")
    cells = plan(table, target, rows, folder, asked.python, asked.limit)
    if asked.tasks:
        known = {cell.task.name for cell in cells}
        if not known.issuperset(asked.tasks):
            parser.error(f"--tasks: allowed in this table: {', '.join(sorted(map(str, known)))}")
        cells = [cell for cell in cells if cell.task.name in asked.tasks]
    if asked.dry_run:
        prefix = [f"{name}={value}" for name, value in target.environment.items()]
        for cell in cells:
            print(" ".join([*prefix, shlex.join(cell.command)]))
        return 0

    versions = _versions(asked.python)
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        parser.error(
            f"{asked.python} has no {', '.join(missing)}: `pip install . ./benchmarks/public` "
            "in an environment of your choice, and pass its Python as --python"
        )
    if asked.table == "scenes":
        _write_scenes_once()
    for number, cell in enumerate(cells, 1):
        label = f"[{number}/{len(cells)}] {cell.setting.name}, {cell.task.name}"
        if asked.resume and cell.read() and cell.error is None:
            print(f"{label}: kept", file=sys.stderr, flush=True)
        else:
            print(label, file=sys.stderr, flush=True)
            cell.run(target.environment)
        if cell.error:
            print(f"{label}: {cell.error}", file=sys.stderr, flush=True)
        # Written after each cell, so that an interrupted run loses nothing.
        text = f"Table {asked.table}: {table.title}\n\n{markdown(table, cells)}\n"
        about = {"table": asked.table, "limit": asked.limit, "versions": versions}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(text)
        document = {**about, "cells": as_json(cells)}
        (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    print(text)
    return 1 if any(cell.error for cell in cells) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.public.run", description=__doc__)
    titles = "; ".join(f"{name}: {table.title}" for name, table in TABLES.items())
    parser.add_argument("--table", required=True, choices=TABLES, help=titles)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--server", metavar="URL", help="a vLLM server with the plugin")
    what.add_argument("--llm", metavar="MODEL", help="weights for LLM(...), without a server")
    parser.add_argument("--model", metavar="NAME", help="the served name; default: the first")
    parser.add_argument("--budgets", nargs="+", type=_budget, metavar="TOKENS|FRACTION|none")
    parser.add_argument(
        "--selectors", nargs="+", type=_selector, default=[DEFAULT_SELECTOR], metavar="NAME"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these of the table")
    parser.add_argument("--limit", type=_count, help="questions per task, for a trial")
    parser.add_argument(
        "--model-args", default="", metavar="A=B,C=D", help="further arguments for the model"
    )
    parser.add_argument("--python", default=sys.executable, help="a Python that has lmms-eval")
    parser.add_argument("--output", type=Path, help="default: benchmarks/output/public/table-TABLE")
    parser.add_argument(
        "--resume", action="store_true", help="keep cells that the output folder already has"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser


def _budget(text: str) -> Budget | None:
    try:
        return parse_budget_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _selector(text: str) -> str:
    try:
        return str(parse_selector(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number, 1 or more; got {text!r}")
    return int(text)


def _versions(python: str) -> dict[str, str | None]:
    """Return the versions of the packages that the benchmark needs in a Python environment."""
    script = (
        "import json\n"
        "from importlib.metadata import distributions\n"
        "found = {one.name.replace('_', '-').lower(): one.version for one in distributions()}\n"
        f"print(json.dumps({{name: found.get(name) for name in {NEEDED!r}}}))"
    )
    answer = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    versions: dict[str, str | None] = json.loads(answer.stdout)
    return versions


def _write_scenes_once() -> None:
    # Not at the top: NumPy and Pillow are needed for this table only.
    from benchmarks.public.scenes import FOLDER, write_scenes

    if not (FOLDER / "questions.jsonl").exists():
        write_scenes(FOLDER, scenes=40, per_scene=3, seed=0)


if __name__ == "__main__":
    sys.exit(main())
