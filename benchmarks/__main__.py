# SPDX-License-Identifier: Apache-2.0
"""Lists the benchmarks, or runs one: ``python -m benchmarks [NAME [ARGUMENT ...]]``."""

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Return the first line of each benchmark's docstring by the benchmark's name."""
    # The packages are read, not imported: importing some of them takes seconds.
    return {
        file.parent.name: summary(file.with_name("__init__.py"))
        for file in sorted(HERE.glob("*/run.py"))
    }


def summary(file: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """List the benchmarks, or run the named one with the other arguments."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    known = benchmarks()
    if name in known:
        module = f"benchmarks.{name}.run"
        sys.argv = [module, *rest[:-1]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    width = max(map(len, known))
    print("usage: python -m benchmarks NAME [ARGUMENT ...]; NAME --help lists its arguments\n")
    print("\n".join(f"{each:{width}}  {line}" for each, line in known.items()))
    if name in ("", "-h", "--help"):
        return 0
    print(f"\nunknown benchmark: {name}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
