# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark without a server: plan, photographs, figures, targets."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.measuring.turn import Turn
from benchmarks.serving.figures import (
    Measured,
    Residency,
    level_table,
    marks,
    prefill_lines,
    residency_table,
)
from benchmarks.serving.photos import write_photos
from benchmarks.serving.plan import (
    COLUMNS,
    FULL,
    NONE,
    STOCK,
    TEXT,
    Level,
    budget_of,
    order,
    seed,
    uses_plugin,
)

NOISE = [1.0, 1.01, 0.99, 1.004, 0.996, 1.002, 0.998, 1.006, 0.994, 1.0]
SECONDS = {STOCK: 4.0, NONE: 4.0, "128": 2.0, "64": 1.5, "32": 1.2, TEXT: 3.6}


def measured(rounds: int = 10, clients: int = 8, **seconds: float) -> Measured:
    """Return turns of two requests on a machine that slows down, with noise."""
    level = Level("random", clients, rounds, prompts=2, with_text=True)
    found = Measured(level)
    for shift, (column, usual) in enumerate(SECONDS.items()):
        base = seconds.get(column.replace(" ", "_"), usual)
        found.turns[column] = [
            Turn(base * (1 + index) * NOISE[(index + 3 * shift) % 10], (0.1, 0.2), (0.01, 0.02))
            for index in range(rounds)
        ]
        found.prompt_tokens[column] = 614.0
        found.preemptions[column] = shift
    return found


def verdicts(found: Measured) -> list[bool | None]:
    """Return the verdicts on: faster, twice as fast, no cost."""
    return [mark.met for mark in marks([found])]


def test_stock_and_no_budget_run_next_to_each_other_in_alternating_order() -> None:
    columns = FULL.levels[0].columns
    rounds = [order(columns, index) for index in range(10)]
    assert all(sorted(one) == sorted(columns) for one in rounds)
    gaps = [one.index(NONE) - one.index(STOCK) for one in rounds]
    assert sorted(gaps) == [-1] * 5 + [1] * 5
    for column in columns:
        places = [one.index(column) for one in rounds]
        assert min(places) <= 1
        assert max(places) >= len(columns) - 2


def test_turns_of_a_server_have_distinct_seeds() -> None:
    sent = [
        (uses_plugin(column), seed(index, round_, column))
        for index, level in enumerate(FULL.levels)
        for round_ in range(level.rounds)
        for column in level.columns
    ]
    assert len(set(sent)) == len(sent)
    assert seed(1, 2, STOCK) == seed(1, 2, NONE)


def test_the_full_plan_has_the_loads_and_pairs_that_the_targets_need() -> None:
    by_clients = {level.clients: level for level in FULL.levels if level.traffic == "random"}
    assert set(by_clients) == {1, 8, 32}
    assert all(level.rounds >= 6 for level in FULL.levels)
    assert by_clients[1].rounds >= 10
    assert by_clients[8].rounds >= 10
    assert all(level.prompts >= level.clients for level in FULL.levels)


def test_columns_have_the_right_server_and_budget() -> None:
    assert [budget_of(column) for column in COLUMNS] == [None, None, 128, 64, 32]
    assert [uses_plugin(column) for column in (*COLUMNS, TEXT)] == [
        False, True, True, True, True, False,
    ]  # fmt: skip


def test_photographs_differ_by_seed(tmp_path: Path) -> None:
    def images(number: int) -> list[str]:
        lines = write_photos(tmp_path / "x" / "photos.jsonl", 7, number).read_text().splitlines()
        return [json.loads(line)["image_files"][0] for line in lines]

    first, again, other = images(1), images(1), images(2)
    assert first == again
    assert len({*first, *other}) == 14
    assert all(image.startswith("data:image/jpeg;base64,") for image in first)


def test_a_faster_server_has_a_speed_above_one_computed_within_rounds() -> None:
    speed = measured().speed("64")
    assert speed.median == pytest.approx(4 / 1.5, rel=0.02)
    assert speed.interval is not None
    assert speed.interval[1] - speed.interval[0] < 0.1
    assert measured().prefill_share().median == pytest.approx(0.9, rel=0.02)


def test_all_targets_are_met() -> None:
    assert verdicts(measured()) == [True, True, True]


def test_a_budget_without_enough_speedup_is_missed() -> None:
    assert verdicts(measured(**{"64": 4.5})) == [False, False, True]
    assert verdicts(measured(**{"64": 2.5})) == [True, False, True]


def test_twice_as_fast_is_judged_only_if_prefill_dominates_stock() -> None:
    assert verdicts(measured(text_only=2.0)) == [True, False, True]


def test_a_cost_without_a_budget_is_missed_and_a_gain_is_not() -> None:
    assert verdicts(measured(no_budget=4.4)) == [True, True, False]
    assert verdicts(measured(no_budget=3.6)) == [True, True, True]


def test_too_few_rounds_are_not_judged() -> None:
    assert verdicts(measured(rounds=2)) == [None, None]
    assert verdicts(measured(rounds=6)) == [True, True]  # too few pairs for "no cost"


def test_only_eight_clients_have_the_target_of_twice_as_fast() -> None:
    assert len(marks([measured(clients=32, **{"64": 2.5})])) == 2


def test_on_a_gpu_the_target_is_three_times_as_fast_with_32_clients() -> None:
    # Stock takes 4 s per turn.
    slow, fast = measured(clients=32, **{"64": 1.5}), measured(clients=32, **{"64": 1.0})
    assert [mark.met for mark in marks([slow], on_gpu=True)][:2] == [True, False]
    assert [mark.met for mark in marks([fast], on_gpu=True)][:2] == [True, True]
    assert len(marks([measured(clients=8)], on_gpu=True)) == 2


def test_residency_counts_whole_kv_blocks() -> None:
    whole = Residency(blocks=340, block_size=32, prompt_tokens=614, clients=21, seen=17)
    assert (whole.per_request, whole.computed) == (20, 17)
    kept = Residency(blocks=340, block_size=32, prompt_tokens=102, clients=64, seen=64)
    assert (kept.per_request, kept.computed) == (4, 85)
    rows = residency_table({"stock": whole, "64": kept}).splitlines()
    assert rows[2] == "| stock | 614 | 20 | 17 | 17 of 21 clients |"
    assert rows[3] == "| 64 | 102 | 4 | 85 | 64 of 64 clients |"


def test_the_level_table_has_a_row_per_column() -> None:
    rows = level_table(measured()).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {column}" for column in COLUMNS]
    assert len({row.count("|") for row in rows}) == 1
    assert " | 1 | 150 | 199 | 15.0 | 19.9 | 0 |" in rows[2] or "| 1 | 150 | 200 |" in rows[2]
    for row, column in itertools.islice(zip(rows[2:], COLUMNS, strict=True), 1, None):
        assert f"{measured().speed(column)}" in row


def test_the_prefill_share_is_reported_where_it_was_measured() -> None:
    assert prefill_lines([measured()]).startswith("* random, 8 clients: 0.90 (")
    photos = measured()
    photos.level = Level("photos", 8, 6, 8)
    assert prefill_lines([photos]) == ""
