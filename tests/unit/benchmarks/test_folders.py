# SPDX-License-Identifier: Apache-2.0
"""Every benchmark has the same files, a line in the list, and a report made of its results."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks.idle import figures as idle
from benchmarks.large_pictures import figures as large_pictures
from benchmarks.measuring.folders import committed
from benchmarks.profile import figures as profile

NAMES = sorted(
    path.name
    for path in committed("").iterdir()
    if (path / "__init__.py").is_file() and path.name != "measuring"
)
MEASURED_NOTHING = ("gpu", "overview", "public")
"""Without committed results: not run yet, or made of other benchmarks' results."""


def test_there_are_folders() -> None:
    assert {"accuracy", "idle", "serving"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_has_the_usual_files(name: str) -> None:
    expected = {"__init__.py", "run.py", "figures.py", "README.md"}
    if name not in MEASURED_NOTHING:
        expected |= {"results.json", "report.md"}
    assert expected <= {path.name for path in committed(name).iterdir()}
    readme = (committed("") / "README.md").read_text()
    assert f"]({name}/README.md)" in readme


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(program.benchmarks()) == NAMES
    assert program.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in NAMES)
    assert all(line and len(line) < 100 for line in program.benchmarks().values())


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["servings"]) == 2
    assert "unknown benchmark: servings" in capsys.readouterr().err


def test_arguments_go_to_the_benchmark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as end:
        program.main(["overview", "--help"])
    assert end.value.code == 0
    assert "usage: run.py" in capsys.readouterr().out


def results(name: str) -> tuple[dict, str]:
    folder: Path = committed(name)
    return json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()


def test_reports_are_made_of_the_results() -> None:
    found, report = results("idle")
    assert report.strip() == idle.report(idle.medians(found["starts"]))
    found, report = results("profile")
    assert report.strip() == profile.report(found["milliseconds"])
    found, report = results("large_pictures")
    pairs = [
        large_pictures.Pair(
            pair["tower"],
            pair["name"],
            large_pictures.Request(**pair["ours"]),
            large_pictures.Request(**pair["stock"]),
        )
        for pair in found["pairs"]
    ]
    assert report.strip() == large_pictures.report(pairs)
