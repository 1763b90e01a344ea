# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on one commit: what is left runs, what is done does not, a failure is not noted."""

import json
from pathlib import Path

from benchmarks.__main__ import benchmarks
from benchmarks.accuracy.run import PARTS
from benchmarks.measuring.report import instructions
from flashvlm_vllm.selection.registry import BUILT_IN
from scripts.figures import LEDGER, ROOT, STEPS, Step, git, is_this_code, left, measure, read

ELSEWHERE = {"gpu", "public", "overview"}
"""On a GPU, with public weights, or made of other results."""


def test_every_command_of_a_benchmark_on_the_cpu_is_a_step() -> None:
    commands = set()
    for name in set(benchmarks()) - ELSEWHERE:
        for file in (ROOT / "benchmarks" / name).glob("*.py"):
            if '\nif __name__ == "__main__":\n' in file.read_text():
                commands.add(f"benchmarks.{name}.{file.stem}")
    assert {each.command.split()[0] for each in STEPS} == commands
    assert set(read(LEDGER)) <= {each.name for each in STEPS}


def test_the_steps_of_the_accuracy_are_all_selectors_and_parts_once() -> None:
    options = [
        each.command.split()[1:] for each in STEPS if each.command.startswith("benchmarks.accuracy")
    ]
    served = [["--parts", "served", "--selectors", name] for name in BUILT_IN]
    others = [["--parts", part] for part in PARTS if part != "served"]
    assert options[:-1] == served + others
    assert options[-1][-2:] == ["--output", "benchmarks/accuracy/seed-2"]


def test_a_run_goes_on_where_it_stopped_and_a_new_commit_starts_again(tmp_path: Path) -> None:
    ledger = tmp_path / "figures.json"
    steps = [Step(name, name, 1) for name in ("first", "broken", "last")]
    ran: list[str] = []

    def run(command: str) -> int:
        ran.append(command)
        return int(command == "broken" and ran.count(command) == 1)

    def at(commit: str) -> list[str]:
        def is_done(other: str | None) -> bool:
            return other == commit

        return measure(steps, ledger, commit, is_done=is_done, run=run)

    assert at("a") == ["broken"]
    assert set(json.loads(ledger.read_text())) == {"first", "last"}
    assert at("a") == []
    assert ran == ["first", "broken", "last", "broken"]
    assert at("b") == []
    assert ran[4:] == ["first", "broken", "last"]
    assert {each["commit"] for each in read(ledger).values()} == {"b"}
    assert {each["instructions"] for each in read(ledger).values()} == {instructions()}
    assert left(steps, read(ledger), lambda commit: commit == "b") == []


def test_figures_of_a_commit_with_other_code_are_not_of_this_code() -> None:
    assert not is_this_code(None)
    assert not is_this_code("no-such-commit")
    head = git("rev-parse", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "flashvlm_vllm", "small_vlm").returncode != 0
    assert is_this_code(head) != changed
