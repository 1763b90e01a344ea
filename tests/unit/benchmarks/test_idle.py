# SPDX-License-Identifier: Apache-2.0
"""The idle benchmark without a server: order of servers, statistics, verdict, tables."""

import itertools

import pytest

from benchmarks.idle import run
from benchmarks.idle.figures import (
    FIGURES,
    STOCK,
    STOCK_AGAIN,
    Ratio,
    marks,
    medians,
    ratio,
    ratios,
    ratios_table,
    servers_table,
)
from benchmarks.measuring.pairs import interval

Runs = dict[str, list[dict[str, float]]]
NOISE = [1.0, 1.01, 0.99, 1.004, 0.996, 1.002, 0.998, 1.006, 0.994, 1.0]


def missed(compared: list[Ratio]) -> list[str]:
    return [mark.asked for mark in marks(compared) if mark.met is False]


def runs(**slower: float) -> Runs:
    """Return ten noisy starts on a machine that slows down; each server ``slower`` times stock."""
    measured: Runs = {}
    for shift, server in enumerate((STOCK, "disabled", "idle", STOCK_AGAIN)):
        factor = slower.get(server.replace(" ", "_"), 1.0)
        seconds = [
            0.5 * (1 + index) * factor * NOISE[(index + 3 * shift) % len(NOISE)]
            for index in range(len(NOISE))
        ]
        measured[server] = [
            {
                "request_throughput": 1 / each,
                "mean_ttft_ms": 400 * each,
                "p99_ttft_ms": 800 * each,
                "mean_tpot_ms": 10 * each,
            }
            for each in seconds
        ]
    return measured


@pytest.mark.parametrize(
    ("count", "place"), [(6, 1), (8, 1), (9, 2), (10, 2), (11, 2), (12, 3), (20, 6), (25, 8)]
)
def test_the_interval_ends_at_the_tabulated_ranks(count: int, place: int) -> None:
    """The ranks are those of published tables of confidence intervals of a median."""
    values = [float(value) for value in range(1, count + 1)]
    assert interval(values[::-1]) == (place, count + 1 - place)


@pytest.mark.parametrize("count", [6, 8, 11, 12])
def test_the_interval_covers_at_least_95_percent_of_all_sign_patterns(count: int) -> None:
    """A round is on either side of the true median, here zero, with equal probability."""
    sizes = [1.0 + index for index in range(count)]
    missing = 0
    for signs in itertools.product((-1, 1), repeat=count):
        low, high = interval([s * v for s, v in zip(signs, sizes, strict=True)])
        missing += not low <= 0 <= high
    assert 0 < missing / 2**count <= 0.05


def test_one_disturbed_round_does_not_move_the_interval() -> None:
    low, high = interval([*NOISE[:-1], 5.0])
    assert 0.98 < low < 1 < high < 1.02


def test_too_few_rounds_have_no_interval() -> None:
    with pytest.raises(ValueError, match="5 rounds"):
        interval([0.0] * 5)


def test_a_slower_server_has_ratios_above_one_in_every_figure() -> None:
    compared = ratios(runs(idle=1.1))
    assert {r.figure for r in compared} == set(FIGURES)
    for r in compared:
        expected = 1.1 if r.server == "idle" else 1.0
        assert r.median == pytest.approx(expected, abs=0.01)
        assert r.low <= r.median <= r.high
        assert len(r.starts) == len(NOISE)


def test_a_disturbed_turn_does_not_change_the_figure_of_its_start() -> None:
    turns = runs()[STOCK]
    assert medians([{STOCK: turns[:3]}, {STOCK: [turns[5]]}]) == {STOCK: [turns[1], turns[5]]}


def test_ratios_are_computed_within_starts() -> None:
    """The machine becomes ten times slower; the ratio does not change."""
    measured = runs()
    r = ratio("idle", "mean_ttft_ms", measured["idle"], measured[STOCK])
    assert 0.97 < r.low < 1 < r.high < 1.03
    with pytest.raises(ValueError, match="zip"):
        ratio("idle", "mean_ttft_ms", measured["idle"][1:], measured[STOCK])


def test_the_check_passes_without_a_difference() -> None:
    assert missed(ratios(runs())) == []


def test_the_check_fails_for_a_slowdown_but_not_for_a_speedup() -> None:
    lines = missed(ratios(runs(idle=1.1, disabled=0.9)))
    assert len(lines) == 2
    assert all(line.startswith("idle / stock") for line in lines)
    assert "time per request" in lines[0]
    assert "TTFT" in lines[1]


def test_the_check_reports_that_two_stock_servers_differ() -> None:
    lines = missed(ratios(runs(stock_again=1.1)))
    assert len(lines) == 2
    assert all("too noisy" in line for line in lines)


def test_the_verdict_needs_the_whole_interval() -> None:
    by_factor = {
        factor: ratio("idle", "mean_tpot_ms", runs(idle=factor)["idle"], runs()[STOCK]).verdict
        for factor in (1.0, 1.02, 1.1)
    }
    assert by_factor == {1.0: "not slower", 1.02: "undecided", 1.1: "slower"}


def test_tables_have_a_row_per_server_and_per_ratio() -> None:
    measured = runs(idle=1.1)
    servers = servers_table(measured).splitlines()
    assert servers[0].count("|") == servers[1].count("|") == servers[2].count("|")
    assert [row.split(" | ")[0] for row in servers[2:]] == [f"| {name}" for name in measured]

    rows = ratios_table(ratios(measured)).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + 3 * len(FIGURES)
    assert rows[2].startswith("| time per request | disabled / stock | ")
    assert rows[3].endswith(" | slower |")


def test_the_order_has_every_server_in_every_place_and_after_every_other() -> None:
    rounds = [run.order(index) for index in range(len(run.SETUPS))]
    assert all(sorted(place) == sorted(run.SETUPS) for place in zip(*rounds, strict=True))
    neighbours = [pair for order in rounds for pair in itertools.pairwise(order)]
    assert sorted(neighbours) == sorted(itertools.permutations(run.SETUPS, 2))


def test_only_the_idle_server_enables_the_plugin_and_stock_loads_none() -> None:
    for name in (STOCK, STOCK_AGAIN):
        assert run.SETUPS[name].environment == {"VLLM_PLUGINS": ""}
        assert run.SETUPS[name].arguments == ()
    assert run.SETUPS["disabled"] == run.Setup()
    assert run.SETUPS["idle"].arguments == ("--plugins", "flashvlm")


def test_too_few_starts_are_refused_before_a_server_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run.main(["--starts", "5"])
    assert "at least 6" in capsys.readouterr().err
