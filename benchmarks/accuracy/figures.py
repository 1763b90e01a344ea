# SPDX-License-Identifier: Apache-2.0
"""Tables and plots, from ``results.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy.rows import (
    ABLATED,
    PARTS_OF_2,
    POSITIONS_CLOSED,
    POSITIONS_KEPT,
    READINGS,
    SWEPT,
)
from benchmarks.accuracy.statistics import Interval, Paired, paired, relative, share
from benchmarks.measuring.report import table
from flashvlm_vllm.selection.registry import BUILT_IN
from small_vlm.language import FAMILIES

RIVAL: Final = "vispruner"
STRONG: Final = ("flashvlm", "flashvlm-2", "llm-attention")
INSIDE: Final = ("tome", "fastv", "sparsevlm")
BOUNDS: Final = ("oracle", "downscale")
# Table 1, column ACC, and Table 12 (means of its three sets), as the paper prints them.
PAPER: Final[dict[str, dict[str, tuple[float, float, float]]]] = {
    "plain": {
        "tome": (83.9, 73.9, 61.4),
        "fastv": (85.4, 75.9, 64.1),
        "sparsevlm": (94.4, 86.4, 77.9),
        "prumerge+": (95.8, 90.6, 83.0),
        "visionzip": (98.4, 95.6, 89.0),
        "vispruner": (99.7, 96.6, 91.5),
        "flashvlm": (100.6, 97.9, 92.8),
    },
    "stress": {
        "vispruner": (33.4, 26.2, 15.1),
        "sparsevlm": (49.4, 40.4, 27.2),
        "flashvlm": (60.4, 53.3, 47.1),
    },
    "clips": {
        "fastv": (96.6, 92.1, 86.0),
        "vispruner": (98.2, 95.1, 90.3),
        "flashvlm": (98.8, 95.5, 90.7),
    },
}
PAPER_GROUNDING: Final = {
    "fastv": (2.86, 1.52, 0.21),
    "sparsevlm": (2.43, 1.36, 0.27),
    "vispruner": (1.63, 0.91, 0.35),
    "flashvlm": (1.08, 0.76, 0.46),
}
TITLES: Final = {
    "plain": "Accuracy by selector and budget (as Table 1)",
    "stress": "The question is about a small object beside large ones (as Table 12)",
    "clips": "Clips of four frames (as Table 2)",
}
PAPER_COLUMN: Final = {
    "plain": "paper: ACC",
    "stress": "paper: mean accuracy",
    "clips": "paper: accuracy, share of unpruned",
}


class Set:
    """One test set's answers."""

    def __init__(self, found: dict[str, Any], name: str) -> None:
        self.name = name
        self.families: list[str] = found["sets"][name]["families"]
        self.rows: dict[str, list[bool]] = {
            row: [mark == "1" for mark in marks] for row, marks in found["right"][name].items()
        }
        self.budgets: list[int] = found["about"]["budgets"]
        self.frames: int = found["about"]["frames"] if name == "clips" else 1
        self.tokens: int = found["about"]["visual_tokens"] * self.frames

    @property
    def has_unpruned(self) -> bool:
        """Whether the unpruned model was measured."""
        return bool({"unpruned", "unpruned (Transformers)"} & self.rows.keys())

    @property
    def unpruned(self) -> list[bool]:
        """Return answers without a budget: of the server, else of Transformers."""
        return self.rows.get("unpruned") or self.rows["unpruned (Transformers)"]

    def family(self, row: Sequence[bool], family: str) -> float:
        """Return a row's accuracy within a family of questions."""
        marks = [ok for ok, each in zip(row, self.families, strict=True) if each == family]
        return sum(marks) / len(marks)

    def without_where(self, row: Sequence[bool]) -> Interval:
        """Return the share of the unpruned model over all other kinds of questions."""
        others = [index for index, family in enumerate(self.families) if family != "where"]
        return relative(
            [row[index] for index in others],
            [self.unpruned[index] for index in others],
            [self.families[index] for index in others],
        )


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Write ``report.md`` and the plots."""
    sets = {name: Set(found, name) for name in TITLES if name in found.get("right", {})}
    parts = ["<!-- Written by python -m benchmarks.accuracy.run. -->\n"]
    # A run of some parts may have left nothing to compare with.
    whole = [one for one in sets.values() if one.has_unpruned]
    for one in whole:
        parts.append(accuracy_table(one))
        if all(f"{name}@{budget}" in one.rows for name in BUILT_IN for budget in one.budgets):
            parts.append(text_guidance_table(one))
    for name in ("plain", "stress"):
        if name in sets and any(row.rpartition("@")[0] in ABLATED for row in sets[name].rows):
            parts += [variants_tables(sets[name])]
    if "grounding" in found:
        parts.append(grounding_table(found))
        parts.append(alignment_table(found["alignment"]))
        for name, count in found["above_the_floor"].items():
            parts.append(
                f"Patches of 576 with a relevance (eq 6) of 0.1 or more, {name} set: {count:.1f}.\n"
            )
    if "agreement" in found:
        parts.append(agreement_table(found["agreement"]))
    (folder / "report.md").write_text("\n".join(parts))
    for one in whole:
        plot(one, folder / f"{one.name}.png")


def accuracy_table(one: Set) -> str:
    """Return a set's table, unpruned and oracle lines included."""
    families = [family for family in FAMILIES if family in one.families]
    head = [
        "tokens", "row", *families, "all (95 %)", "share of unpruned (95 %)",
        *(["without *where*"] if "where" in families else []),
        f"against {RIVAL}", PAPER_COLUMN[one.name],
    ]  # fmt: skip
    whole = one.unpruned
    cells = [f"{one.family(whole, family):.3f}" for family in families]
    paper = "" if one.name == "stress" else "100"
    ones = ["1"] * (1 + ("where" in families))
    rows = [[str(one.tokens), "unpruned", *cells, shown(share(whole)), *ones, "", paper]]
    for index, budget in enumerate(one.budgets):
        rival = one.rows.get(f"{RIVAL}@{budget}")
        for row in (*BOUNDS, *INSIDE, *BUILT_IN, *POSITIONS_CLOSED, *POSITIONS_KEPT):
            right = one.rows.get(f"{row}@{budget}")
            if right is None:
                continue
            against = "" if rival is None or row == RIVAL else tested(paired(right, rival))
            printed = PAPER[one.name].get(row)
            rows.append(
                [
                    str(budget * one.frames),
                    f"**{row}**" if row in STRONG else row,
                    *(f"{one.family(right, family):.3f}" for family in families),
                    shown(share(right)),
                    shown(relative(right, whole, one.families)),
                    *([shown(one.without_where(right))] if "where" in families else []),
                    against,
                    "" if printed is None else f"{printed[index]}",
                ]
            )
    return f"## {TITLES[one.name]}\n\nn = {len(whole)} questions.\n\n{table(head, rows)}\n"


def variants_tables(one: Set) -> str:
    """Return ablations (Table 5), sweeps (Table 11) and readings, compared with the default."""
    groups = {
        "Ablations (as Table 5)": ("flashvlm", list(ABLATED)),
        "Sweeps (as Table 11)": ("flashvlm", list(SWEPT)),
        "Other readings of the method": ("flashvlm", list(READINGS)),
        "flashvlm-2 without its parts": ("flashvlm-2", list(PARTS_OF_2)),
    }
    budgets = [f"{budget} tokens" for budget in one.budgets]
    parts = []
    for title, (selector, rows) in groups.items():
        default = [one.rows.get(f"{selector} (Transformers)@{budget}") for budget in one.budgets]
        first = [selector, *("" if right is None else shown(share(right)) for right in default)]
        variants = [against_default(one, row, selector) for row in rows]
        title = f"## {title}, {one.name} set"
        parts.append(f"{title}\n\n{table(['', *budgets], [first, *variants])}\n")
    kept = [against_default(one, row, row.partition(",")[0]) for row in POSITIONS_KEPT]
    title = f"## Kept tokens keep their positions, {one.name} set"
    head = ["against vLLM's positions", *budgets]
    parts.append(f"{title}\n\n{table(head, kept)}\n")
    return "\n".join(parts)


def against_default(one: Set, row: str, selector: str) -> list[str]:
    """Return a row's accuracy at each budget with its difference to a selector on Transformers."""
    cells = [row.replace("_", " ")]
    for budget in one.budgets:
        right = one.rows.get(f"{row}@{budget}")
        base = one.rows.get(f"{selector} (Transformers)@{budget}")
        if right is None or base is None:
            cells.append("")
        else:
            cells.append(f"{share(right).value:.3f} ({tested(paired(right, base))})")
    return cells


def grounding_table(found: dict[str, Any]) -> str:
    """Return Table 3."""
    budgets = found["about"]["budgets"]
    parts = ["## Where scores and kept tokens lie (as Table 3)\n"]
    for name, methods in found["grounding"].items():
        head = ["row", "attention distance, patches", "score-map entropy, nats"]
        head += [f"IoU / coverage at {budget}" for budget in budgets]
        head.append("paper: distance, entropy, IoU")
        rows = []
        for method, values in methods.items():
            both = (values["distance"], values["entropy"])
            cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in both]
            for budget in budgets:
                iou, cover = values[f"iou {budget}"][0], values[f"coverage {budget}"][0]
                cells.append(f"{iou:.3f} / {cover:.3f}")
            paper = ", ".join(str(value) for value in PAPER_GROUNDING.get(method, ()))
            rows.append([method, *cells, paper])
        (count,) = methods["flashvlm"]["count"]
        parts.append(
            f"{name} set, {count} questions about an object that is there (mean and standard "
            f"error).\n\n{table(head, rows)}\n"
        )
    return "\n".join(parts)


def alignment_table(found: dict[str, Any]) -> str:
    """Return the similarity of patches and words of the question, by group of words."""
    head = [
        "set", "words", "inside the box", "outside", "inside nearer than outside (AUC)",
        "weight in eq 5",
    ]  # fmt: skip
    rows = [
        [name, group, *(f"{near[key]:.3f}" for key in ("inside", "outside", "auc", "weight"))]
        for name, groups in found.items()
        for group, near in groups.items()
    ]
    title = "## How near patches are to words: the largest cosine to any of them, on average"
    return f"{title}\n\n{table(head, rows)}\n"


def text_guidance_table(one: Set) -> str:
    """Compare selectors that use the question with those that do not."""
    blind = [name for name, selector in BUILT_IN.items() if not selector.uses_question]
    head = ["", "tokens", *(f"against {name}" for name in blind)]
    rows = []
    for name, selector in BUILT_IN.items():
        for budget in one.budgets if selector.uses_question else ():
            right = one.rows[f"{name}@{budget}"]
            cells = [tested(paired(right, one.rows[f"{other}@{budget}"])) for other in blind]
            rows.append([name, str(budget * one.frames), *cells])
    title = f"## Selectors that read the question against those that do not, {one.name} set"
    return f"{title}\n\n{table(head, rows)}\n"


def agreement_table(found: dict[str, Any]) -> str:
    """Return how often server and Transformers agree."""
    head = ["selector", "same answer", "same kept set", "same answer from the same kept set"]
    rows = []
    count = found["questions"]
    for name, row in found.items():
        if isinstance(row, dict):
            values = [row.get(key) for key in ("answers", "kept", "answers_given_kept")]
            rows.append(
                [name, *("" if value is None else f"{value} of {count}" for value in values)]
            )
    return f"## Server and Transformers\n\nBudget {found['budget']}.\n\n{table(head, rows)}\n"


def plot(one: Set, path: Path) -> None:
    """Draw accuracy over budget with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    whole = share(one.unpruned)
    axes.axhline(whole.value, color="black", linewidth=1, label="unpruned")
    axes.axhspan(whole.low, whole.high, color="black", alpha=0.08)
    for row in (*BOUNDS, *INSIDE, *BUILT_IN):
        known = [budget for budget in one.budgets if f"{row}@{budget}" in one.rows]
        if not known:
            continue
        values = [share(one.rows[f"{row}@{budget}"]) for budget in known]
        middle = [each.value for each in values]
        errors = [[m - v.low for m, v in zip(middle, values, strict=True)],
                  [v.high - m for m, v in zip(middle, values, strict=True)]]  # fmt: skip
        strong = row.startswith(("flashvlm", "llm")) or row == "oracle"
        axes.errorbar(
            [budget * one.frames for budget in known], middle, yerr=errors, label=row, capsize=2,
            marker="o", markersize=4, linewidth=2.5 if strong else 1,
            linestyle="--" if row in BOUNDS else "-",
        )  # fmt: skip
    ticks = [budget * one.frames for budget in one.budgets]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("accuracy")
    axes.set_title(TITLES[one.name])
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def shown(value: Interval) -> str:
    """Return a value with its interval."""
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"


def tested(result: Paired) -> str:
    """Return a difference with its p."""
    p = "p < 0.001" if result.p < 0.001 else f"p = {result.p:.3f}"
    return f"{result.difference:+.3f}, {p}"
