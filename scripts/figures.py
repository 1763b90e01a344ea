# SPDX-License-Identifier: Apache-2.0
"""Runs all CPU benchmarks on the code that is checked out: ``make figures`` (hours).

A run that was interrupted goes on with the benchmarks that are left: a benchmark is done if its
figures are of a commit with the same code. `LEDGER` has the commit of each. With ``--list`` nothing
runs; with ``--check`` the exit status is 1 if a benchmark is left.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy.run import PARTS
from benchmarks.measuring.commit import CODE
from benchmarks.measuring.report import instructions
from benchmarks.overview.figures import SELECTORS
from flashvlm_vllm.selection.registry import BUILT_IN

ROOT: Final = Path(__file__).parents[1]
LEDGER: Final = ROOT / "benchmarks" / "figures.json"


@dataclass(frozen=True)
class Step:
    """One command that writes committed figures."""

    name: str
    command: str
    """A module and its arguments."""
    minutes: int
    """About, on two CPU cores."""


ACCURACY: Final = "benchmarks.accuracy.run"
OTHER_WEIGHTS: Final = (
    f"--parts served --selectors {' '.join(SELECTORS)} --positions kept "
    "--model benchmarks/accuracy/seed-2/model --output benchmarks/accuracy/seed-2"
)
STEPS: Final = (
    Step("selection", "benchmarks.selection.run", 8),
    Step("profile", "benchmarks.profile.run", 2),
    Step("startup", "benchmarks.startup.run", 9),
    Step("idle", "benchmarks.idle.run", 25),
    Step("added work", "benchmarks.idle.added_work", 1),
    Step("multiturn", "benchmarks.multiturn.run", 10),
    Step("conversation", "benchmarks.multiturn.conversation", 3),
    Step("answers", "benchmarks.multiturn.answers", 2),
    Step("efficiency", "benchmarks.efficiency.run", 6),
    Step("idle positions", "benchmarks.idle.positions", 2),
    Step("serving", "benchmarks.serving.run", 35),
    Step("serving positions", "benchmarks.serving.positions", 5),
    Step("large pictures", "benchmarks.large_pictures.run", 40),
    Step("language attention", "benchmarks.language_attention.run", 30),
    Step("descriptions", "benchmarks.language_attention.described", 4),
    Step("cost of language attention", "benchmarks.language_attention.cost", 7),
    Step("soak", "benchmarks.soak.run --minutes 60", 70),
    Step("soak of Qwen2.5-VL", "benchmarks.soak.run --minutes 20 --family qwen2.5-vl", 30),
    Step("soak of InternVL", "benchmarks.soak.run --minutes 20 --family internvl", 30),
    Step("faults", "benchmarks.soak.faults", 8),
    *(
        Step(f"accuracy of {name}", f"{ACCURACY} --parts served --selectors {name}", 10)
        for name in BUILT_IN
    ),
    *(
        Step(f"accuracy part {part}", f"{ACCURACY} --parts {part}", 20)
        for part in PARTS
        if part != "served"
    ),
    Step("accuracy of other weights", f"{ACCURACY} {OTHER_WEIGHTS}", 25),
)
"""Accuracy is many steps, since it takes hours: its rows are merged by name."""
OVERVIEW: Final = "benchmarks.overview.run"
"""Makes the plot and tables of the documentation from the results."""


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in the repository."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def is_this_code(commit: str | None) -> bool:
    """Return whether a commit has the code of the working tree."""
    return commit is not None and git("diff", "--quiet", commit, "--", *CODE).returncode == 0


def run(command: str) -> int:
    """Run a module of the repository; return its exit status."""
    return subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, check=False
    ).returncode


def measure(
    steps: Sequence[Step],
    ledger: Path,
    commit: str,
    *,
    is_done: Callable[[str | None], bool] = is_this_code,
    run: Callable[[str], int] = run,
) -> list[str]:
    """Run the steps that are left, and note each in the ledger when it has ended.

    Args:
        steps: the commands.
        ledger: file of what was run.
        commit: the commit that is checked out.
        is_done: says whether figures of a commit are of this code.
        run: runs a command.

    Returns:
        The names of the steps that failed.

    """
    failed = []
    for step in left(steps, read(ledger), is_done):
        print(f"figures: {step.name}, about {step.minutes} minutes", flush=True)
        started = time.monotonic()
        if run(step.command):
            failed.append(step.name)
            continue
        entry = {
            "commit": commit,
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(time.monotonic() - started),
            "instructions": instructions(),
        }
        ledger.write_text(json.dumps(read(ledger) | {step.name: entry}, indent=1) + "\n")
    return failed


def left(
    steps: Sequence[Step], known: dict[str, Any], is_done: Callable[[str | None], bool]
) -> list[Step]:
    """Return the steps whose figures are not of this code."""
    return [each for each in steps if not is_done(known.get(each.name, {}).get("commit"))]


def read(ledger: Path) -> dict[str, Any]:
    """Return the ledger's entries by step."""
    found: dict[str, Any] = json.loads(ledger.read_text()) if ledger.exists() else {}
    return found


def main() -> int:
    """Run what is left, or list it."""
    parser = argparse.ArgumentParser(prog="scripts.figures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(_NAMES)}")
    parser.add_argument("--list", action="store_true", help="only list what is left")
    parser.add_argument("--check", action="store_true", help="as --list; exit with 1 if any is")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(_NAMES):
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(_NAMES)}")
    steps = [each for each in STEPS if not asked.names or each.name in asked.names]
    if asked.list or asked.check:
        width = max(map(len, _NAMES)) + 2
        waiting = left(steps, read(LEDGER), is_this_code)
        for step in steps:
            state = "left" if step in waiting else read(LEDGER)[step.name]["commit"]
            print(
                f"{step.name:{width}}{state:14}{step.minutes:4} minutes  python -m {step.command}"
            )
        return int(asked.check and bool(waiting))
    if git("diff", "--quiet", "HEAD", "--", *CODE).returncode:
        sys.exit(f"figures: {', '.join(CODE)} must have no uncommitted changes")
    failed = measure(steps, LEDGER, git("rev-parse", "--short", "HEAD").stdout.strip())
    if failed:
        print(f"figures: failed: {', '.join(failed)}", file=sys.stderr)
    return run(OVERVIEW) or int(bool(failed))


_NAMES: Final = [each.name for each in STEPS]

if __name__ == "__main__":
    sys.exit(main())
