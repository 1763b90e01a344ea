# SPDX-License-Identifier: Apache-2.0
"""Targets and tables of soak and fault runs, from the figures in ``results.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.report import Mark, marks_table, table
from benchmarks.soak.memory import FLAT, FROM_START
from benchmarks.soak.verdict import NEAR_TIE
from scripts.pages import with_part

PAGE: Final = Path(__file__).parents[2] / "docs" / "operators" / "hardening.md"
"""Has the summary of the committed results."""
FAULTS: Final = "faults"
"""The section of fault runs; all others are soaks."""


def write(folder: Path, section: str, figures: Mapping[str, Any], page: Path | None = None) -> None:
    """Replace a section of ``results.json``; write ``report.md`` and the summary in the page.

    Other sections stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[section] = figures
    path.write_text(json.dumps(found, indent=1) + "\n")
    (folder / "report.md").write_text(draw(found))
    if page:
        page.write_text(with_part(page.read_text(), "soak", summary(found)))


def write_fault(folder: Path, name: str, figures: Mapping[str, Any], page: Path) -> None:
    """Replace one fault run in the report and the page; the others stay."""
    path = folder / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    write(folder, FAULTS, {**found.get(FAULTS, {}), name: figures}, page)


def draw(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->\n"
        "<!-- Written by benchmarks.soak.run and benchmarks.soak.faults. -->",
        "# Soak and fault runs",
        summary(found),
    ]
    parts += [_soak(name, found[name]) for name in found if name != FAULTS]
    if faults := found.get(FAULTS):
        parts += [_faults(faults)]
    return "\n\n".join(parts) + "\n"


def soak_marks(soak: Mapping[str, Any]) -> list[Mark]:
    """Return the targets of a soak."""
    memory = soak["memory"]
    ratios = [
        each[name] for each in memory.values() for name in ("ratio", "own_ratio") if name in each
    ]
    worst = max(ratios, default=None)
    return [
        Mark("wrong answers: 0", str(soak["wrong"]), soak["wrong"] == 0),
        Mark("lost requests: 0", str(soak["lost"]), soak["lost"] == 0),
        Mark(
            "the same answers twice without load",
            f"{len(soak['unstable_when_quiet'])} differ",
            not soak["unstable_when_quiet"],
        ),
        Mark(
            "the same answers one by one after the load",
            f"{len(soak['changed_afterwards'])} differ",
            not soak["changed_afterwards"],
        ),
        Mark(
            "no request runs, waits or has KV blocks after the load",
            str(soak["idle_afterwards"]),
            bool(soak["idle_afterwards"]),
        ),
        Mark(
            f"peak memory of the last {FROM_START} minutes at most {FLAT} times that of the first",
            "run too short" if worst is None else f"at most {worst:.3f}",
            None if worst is None or soak["minutes"] < 30 else worst <= FLAT,
        ),
    ]


def soak_is_well(soak: Mapping[str, Any]) -> bool:
    """Return whether no target was missed."""
    return all(mark.met is not False for mark in soak_marks(soak))


def summary(found: Mapping[str, Any]) -> str:
    """Return a table with one line per run."""
    rows = []
    for name in found:
        if name == FAULTS:
            continue
        soak = found[name]
        first = sum(each["first_mib"] for each in soak["memory"].values())
        last = sum(each["last_mib"] for each in soak["memory"].values())
        rows.append(
            (
                f"{name}, {soak['minutes']} minutes",
                soak["requests"],
                soak["faults"],
                soak["wrong"],
                soak["near_ties"],
                soak["lost"],
                f"{first:.0f} MiB" if first else "",
                f"{last:.0f} MiB" if last else "",
            )
        )
    for name, run in found.get(FAULTS, {}).items():
        rows.append(
            (
                name,
                run["requests"],
                run["faults"],
                run["wrong"],
                run["near_ties"],
                run["lost"],
                "",
                "",
            )
        )
    head = (
        *("run", "requests", "faults", "wrong answers", "near ties", "lost requests"),
        *(f"peak memory, first {FROM_START} minutes", f"last {FROM_START} minutes"),
    )
    return table(head, rows)


def _soak(name: str, soak: Mapping[str, Any]) -> str:
    machine = soak["machine"]
    kinds = table(("kind of request", "number"), list(soak["by_kind"].items()))
    memory = table(
        (
            *("process", "resident, first minutes, MiB", "last minutes", "ratio"),
            *("private, first minutes, MiB", "last minutes", "ratio"),
        ),
        [
            (
                *(name, each["first_mib"], each["last_mib"], f"{each['ratio']:.3f}"),
                *(each.get("own_first_mib", ""), each.get("own_last_mib", "")),
                f"{each['own_ratio']:.3f}" if "own_ratio" in each else "",
            )
            for name, each in soak["memory"].items()
        ],
    )
    loaded = []
    if "under_load" in soak:  # Runs before budgets under load have none.
        loaded = [f"{soak['under_load']} answers had the budget under load."]
    return "\n\n".join(
        [
            f"## {name.capitalize()}",
            f"Commit {soak['commit']}, vLLM {machine['vllm']}, torch {machine['torch']}, "
            f"{machine['cores']} cores, of which server and clients share one; allocator "
            f"{soak['allocator']}; {soak['clients']} clients. {soak['compared']} answers were "
            f"compared with those of a server without load, {soak['new_compared']} of them with "
            f"answers given after the load. Seconds per answer that is not streamed: median "
            f"{soak['seconds']['median']}, 99th percentile "
            f"{soak['seconds']['99th']}. A near tie is a different word where, without load, "
            f"the two best words differed by less than {NEAR_TIE} in log probability.",
            marks_table(soak_marks(soak)),
            *loaded,
            kinds,
            memory,
            *soak.get("notes", ()),
        ]
    )


def _faults(faults: Mapping[str, Any]) -> str:
    rows = [(name, run["what"], run["seen"], run["commit"]) for name, run in faults.items()]
    return "\n\n".join(["## Fault runs", table(("run", "fault", "observed", "commit"), rows)])
