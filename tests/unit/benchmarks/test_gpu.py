# SPDX-License-Identifier: Apache-2.0
"""The GPU report: merging of runs, verdicts, time limits of steps, behaviour without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import comparing, keys, pages
from benchmarks.gpu import run as program
from benchmarks.gpu.engines import as_flags, without_broken_parts
from benchmarks.gpu.figures import marks
from benchmarks.gpu.machine import GPU
from benchmarks.gpu.plan import RUNNER, Stage, Step, stages
from benchmarks.gpu.recorder import SCRATCH_VARIABLE, Recorder, recorded, shortened
from benchmarks.gpu.report import report
from benchmarks.gpu.results import RESULTS, Figure, Results, StepResult, read
from benchmarks.gpu.running import Machine, Runner, passed_failed_skipped, unfit
from benchmarks.gpu.stand_ins import put_in_place
from benchmarks.serving.plan import BUDGETS, NONE, STOCK

ROOT = Path(__file__).parents[3]
MACHINE = {
    "date": "2026-01-01 00:00 UTC", "rehearsal": False, "gpu": "Card", "memory_gib": 80.0,
    "driver": "1", "vllm": "0.32.0", "torch": "2.13", "cuda": "13.0", "triton": "3.6",
    "commit": "abc",
}  # fmt: skip


def results(**values: object) -> Results:
    found = Results()
    found.begin(MACHINE)
    found.take("selection", StepResult("done"), {k: Figure(v) for k, v in values.items()})
    return found


class TestMerging:
    def test_new_figures_replace_old_ones_and_others_keep_their_machine(self) -> None:
        found = results(a=1.0, b=2.0)
        found.begin({**MACHINE, "gpu": "Other"})
        found.take("selection", StepResult("done"), {"b": Figure(3.0, "ms")})
        assert found.number("a") == 1.0 and found.number("b") == 3.0
        assert found.machine_of(found.figures["a"])["gpu"] == "Card"
        assert found.machine_of(found.figures["b"])["gpu"] == "Other"

    def test_a_later_failure_of_a_step_keeps_its_figures(self) -> None:
        found = results(a=1.0)
        found.begin(MACHINE)
        found.take("selection", StepResult("failed", reason="no"), {})
        assert found.number("a") == 1.0
        assert not found.is_done("selection")

    def test_a_step_that_is_skipped_later_keeps_its_result(self) -> None:
        found = results(a=1.0)
        found.begin(MACHINE)
        found.take("selection", StepResult("skipped", reason="0 s left"), {})
        assert found.is_done("selection")

    def test_results_are_read_as_written(self, tmp_path: Path) -> None:
        found = results(a=1.0, b=True, c="text")
        found.write(tmp_path / "results.json")
        again = read(tmp_path / "results.json")
        assert again == found
        assert again.number("b") is None and again.number("c") is None

    def test_stages_without_results_run_first(self) -> None:
        known = results()
        all_stages = stages(rehearsal=False)
        for step in all_stages[0].steps:
            known.take(step.name, StepResult("done"), {})
        assert program.in_order(all_stages, known) == [*all_stages[1:], all_stages[0]]


class TestMarks:
    def test_without_results_all_targets_are_open(self) -> None:
        assert {mark.met for mark in marks(Results())} == {None}

    @pytest.mark.parametrize(
        ("name", "met", "missed"),
        [
            (keys.SELECTION_ONE, 0.5, 0.51),
            (keys.SELECTION_32, 2.0, 2.01),
            (keys.SELECTION_CROPS, 1.5, 1.6),
            (keys.tower_share(32), 5.0, 5.1),
            (keys.times_stock("64", 32), 3.0, 2.9),
            (keys.times_stock(NONE, 8), 0.99, 0.97),
            (keys.times_stock("32", 1), 1.0, 0.99),
            (keys.next_speedup(160, keys.SCHEDULED), 4.5, 4.4),
            (keys.SECOND_TTFT, 0.35, 0.36),
            (keys.SECOND_ENCODED, 0, 1),
            (keys.NO_SYNC, True, False),
            (keys.of("v2-bf16-graphs", keys.EQUALS_STOCK), True, False),
            (keys.of("v1-bf16-graphs", keys.ACCURACY_AS_CPU), True, False),
        ],
    )
    def test_a_figure_decides_its_target(self, name: str, met: object, missed: object) -> None:
        judged = [
            mark
            for mark in marks(results(**{name: met}))
            if mark.asked.startswith(name) and mark.met is not None
        ]
        assert judged and all(mark.met for mark in judged)
        assert any(mark.met is False for mark in marks(results(**{name: missed})))

    def test_every_target_has_a_step_that_measures_it(self) -> None:
        """A target without a step that writes its figure could never be judged."""
        written = "\n".join(path.read_text() for path in (ROOT / "benchmarks/gpu").rglob("*.py"))
        names = {step.name for stage in stages(rehearsal=False) for step in stage.steps}
        for mark in marks(Results()):
            engine, _, rest = mark.asked.partition(": ")
            if rest == keys.TESTS or engine.startswith(("v1-", "v2-")):
                assert engine in names, mark.asked
        for constant in ("GPU_TESTS", "SELECTION_LIST", "NO_SYNC", "SECOND_ENCODED"):
            assert written.count(f"keys.{constant}") >= 2, constant


class TestReport:
    def test_a_failure_is_reported_with_its_traceback(self) -> None:
        found = results()
        found.take("selection", StepResult("failed", 3.0, "boom", "Traceback: boom"), {})
        text = report(found)
        assert "| selection | 1 | failed | 3 | boom |" in text
        assert "Traceback: boom" in text

    def test_figures_are_reported_with_their_conditions_and_run(self) -> None:
        found = results()
        found.take("selection", StepResult("done"), {"a": Figure(1.5, "ms", "one | two")})
        assert "| a | 1.5 ms | one \\| two | 1 |" in report(found)
        assert "| 1 | 2026-01-01 00:00 UTC | Card | 80.0 GiB | 1 |" in report(found)

    def test_the_plot_is_drawn(self, tmp_path: Path) -> None:
        from benchmarks.gpu.plot import plot

        names = {
            keys.throughput(STOCK, 1): 2.0,
            keys.next_time(160, keys.SCHEDULED): 50.0,
        }
        plot(results(**names), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5000


class TestPages:
    @pytest.mark.parametrize(("page", "name"), list(pages.PASSAGES))
    def test_pages_agree_with_the_results_file(self, page: str, name: str) -> None:
        text = pages.PASSAGES[page, name](read())
        assert (ROOT / page).read_text() == pages.filled(page, name, text), (
            f"{page} differs from benchmarks/gpu/results.json; run python -m benchmarks.gpu.pages"
        )

    def test_the_committed_report_agrees_with_the_results_file(self) -> None:
        assert (RESULTS.parent / "report.md").read_text() == report(read())

    def test_figures_replace_open_entries(self) -> None:
        name = keys.next_time(160, keys.SCHEDULED)
        assert "| 160 | not run |" in pages.next_table(Results())
        assert "| 160 | 42.0 |" in pages.next_table(results(**{name: 42.0}))
        assert "On Card: " in pages.overview(results(**{name: 42.0}), "")
        targets = pages.marks_of(results(**{keys.SELECTION_ONE: 0.4}), "selection 576")
        assert "| 0.4 | met |" in targets


class TestComparing:
    def leave(self, folder: Path, engine: str, **found: object) -> None:
        comparing.answers_file(folder, engine).write_text(json.dumps(found))

    def test_both_ids_and_log_probabilities_must_equal_stock(self, tmp_path: Path) -> None:
        name = keys.of("v1-bf16-graphs", keys.EQUALS_STOCK)
        alone = [{"ids": [1, 2], "logprobs": [-0.5, -0.25]}]
        self.leave(tmp_path, "v1-bf16-graphs", alone=alone)
        assert name not in comparing.compare_answers(tmp_path)
        for stock, equal in (
            (alone, True),
            ([{"ids": [1, 2], "logprobs": [-0.5, -0.26]}], False),
            ([{"ids": [1, 3], "logprobs": [-0.5, -0.25]}], False),
        ):
            self.leave(tmp_path, "stock-v1", alone=stock)
            assert comparing.compare_answers(tmp_path)[name].value is equal

    def test_chunked_prefill_is_compared_with_a_float32_engine(self, tmp_path: Path) -> None:
        name = keys.of("v2-chunks", keys.CHUNKED)
        answers = {"None": ["a", "b"], "64": ["c"]}
        self.leave(tmp_path, "v2-chunks", answers=answers, chunk=96, dtype="torch.float32")
        whole = {"None": ["a", "b", "z"], "64": ["c"]}
        self.leave(tmp_path, "v1-bf16-graphs", answers=whole, alone=[], dtype="torch.bfloat16")
        assert name not in comparing.compare_answers(tmp_path)
        self.leave(tmp_path, "v2-float32-eager", answers=whole, alone=[], dtype="torch.float32")
        assert comparing.compare_answers(tmp_path)[name].value is True
        whole["64"] = ["d"]
        self.leave(tmp_path, "v2-float32-eager", answers=whole, alone=[], dtype="torch.float32")
        found = comparing.compare_answers(tmp_path)[name]
        assert found.value is False and "2 of 3" in found.conditions


def step(name: str, code: str, seconds: float = 20, **more: object) -> Step:
    """Return a step that runs a line of Python in a separate process."""
    made = Step(name, (), seconds, memory_gib=1, **more)
    object.__setattr__(made, "arguments", ("timeit", "-n1", "-r1", code))
    return made


class TestRunning:
    @pytest.fixture
    def machine(self, tmp_path: Path) -> Machine:
        return Machine(tmp_path, None, at_once=2, until=time.monotonic() + 60)

    def run(self, machine: Machine, *steps: Step) -> dict[str, tuple[StepResult, dict]]:
        ended = {}

        def note(one: Step, result: StepResult, found: dict) -> None:
            ended[one.name] = (result, dict(found))

        Runner(machine, note).run(Stage("some", "", steps), None)
        return ended

    def test_a_failing_step_does_not_stop_the_others(self, machine: Machine) -> None:
        ended = self.run(machine, step("bad", "1/0"), step("good", "pass"))
        assert ended["bad"][0].status == "failed"
        assert "ZeroDivisionError" in ended["bad"][0].reason
        assert "Traceback" in ended["bad"][0].traceback
        assert ended["good"][0].status == "done"

    def test_a_step_is_stopped_at_its_limit_and_its_figures_are_kept(
        self, machine: Machine
    ) -> None:
        code = (
            "import time; from benchmarks.gpu.recorder import Recorder; "
            "Recorder('slow').figure('a', 1.0, 'ms'); time.sleep(60)"
        )
        begun = time.monotonic()
        (found,) = self.run(machine, step("slow", code, seconds=6)).values()
        assert time.monotonic() - begun < 30
        assert found[0].status == "stopped" and found[0].reason.startswith("stopped after")
        assert found[1]["a"].value == 1.0

    def test_child_processes_of_a_stopped_step_are_ended(self, machine: Machine) -> None:
        code = (
            "import subprocess, sys, time; "
            "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], "
            f"start_new_session=True); open({str(machine.folder / 'pid')!r}, 'w').write(str(p.pid))"
            "; time.sleep(300)"
        )
        self.run(machine, step("parent", code, seconds=3))
        child = int((machine.folder / "pid").read_text())
        until = time.monotonic() + 10
        while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
            assert time.monotonic() < until, "it still runs"
            time.sleep(0.1)

    def test_a_step_that_needs_more_memory_is_skipped_with_the_size_in_bytes(
        self, machine: Machine
    ) -> None:
        machine.memory_gib = 0.5
        (found,) = self.run(machine, step("large", "pass")).values()
        assert found[0].status == "skipped"
        assert "needs 1,073,741,824 bytes" in found[0].reason

    def test_no_step_starts_without_enough_time_left(self, machine: Machine) -> None:
        machine.until = time.monotonic() + 5
        assert "s left" in (unfit(step("late", "pass"), machine) or "")

    def test_the_second_model_runner_needs_triton(self, machine: Machine) -> None:
        second = step("second", "pass", environment={RUNNER: "1"})
        assert unfit(second, machine) is None
        machine.has_triton = False
        assert "requires Triton" in (unfit(second, machine) or "")

    def test_results_are_counted_from_junit_xml(self, tmp_path: Path) -> None:
        assert passed_failed_skipped(tmp_path / "none.xml") is None
        junit = tmp_path / "some.xml"
        junit.write_text(
            '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/></testsuites>'
        )
        assert passed_failed_skipped(junit) == (4, 2, 3)


def test_a_failing_part_is_recorded_and_the_step_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path))
    recorder = Recorder("some", "bfloat16")
    with recorder.part("first"):
        raise RuntimeError("boom")
    recorder.check("holds", True, "3 of 3")
    found, failures = recorded(tmp_path, "some")
    assert recorder.finish() == 1 and "boom" in failures["first"]
    assert found["holds"] == Figure(True, conditions="bfloat16; 3 of 3", step="some")


def test_a_long_traceback_keeps_its_beginning_and_its_end() -> None:
    text = "\n".join([*map(str, range(100)), "x" * 1000])
    lines = shortened(text).splitlines()
    assert lines[:40] == [str(number) for number in range(40)]
    assert lines[40] == "... 41 lines ..."
    assert lines[-1] == "x" * 300
    assert shortened("one\ntwo") == "one\ntwo"


def test_broken_features_are_disabled_in_engines() -> None:
    assert without_broken_parts({}) == {}
    assert without_broken_parts({"flash_attention": False})["attention_backend"] == "TRITON_ATTN"
    assert without_broken_parts({"compile": False}) == {"enforce_eager": True}
    assert without_broken_parts({"operators": False})["compilation_config"]
    flags = as_flags({"max_num_seqs": 4, "enforce_eager": False, "seeds": [1, 2], "a": {"b": 1}})
    assert flags == [
        "--max-num-seqs", "4", "--no-enforce-eager", "--seeds", "1", "2", "--a", '{"b": 1}',
    ]  # fmt: skip


def test_broken_libraries_are_replaced_only_in_a_vllm_that_is_not_installed_by_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins, site = tmp_path / "pure", tmp_path / "site"
    stand_ins.mkdir()
    for name in ("_C_stable_libtorch.py", "schemas.txt", "_vllm_fa2_C.py"):
        (stand_ins / name).write_text("")
    (site / "vllm" / "vllm_flash_attn").mkdir(parents=True)
    library = site / "vllm" / "_C_stable_libtorch.abi3.so"
    attention = site / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    library.touch()
    attention.touch()
    (tmp_path / "working.json").write_text('{"operators": false, "flash_attention": false}')
    assert put_in_place(tmp_path, stand_ins) == []  # installed by pip: GPU_SITE is not set
    assert library.exists() and attention.exists()
    monkeypatch.setenv("GPU_SITE", str(site))
    assert put_in_place(tmp_path, stand_ins) == ["flash_attention", "operators"]
    assert not library.exists() and not attention.exists()
    assert (site / "vllm" / "_C_stable_libtorch.py").exists()


class TestCommandLine:
    def test_without_a_gpu_it_exits_with_a_one_line_message(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(program, "find_gpu", lambda: None)
        assert program.main([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no NVIDIA GPU" in line and "--rehearse" in line

    def test_an_older_vllm_gets_the_plugins_error_message(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from flashvlm_vllm.vllm_releases import check_vllm

        monkeypatch.setattr(program, "check_vllm", lambda: check_vllm("0.28.0"))
        assert program.main(["--rehearse"]) == 2
        assert "vLLM 0.28.0 is older than the releases" in capsys.readouterr().err

    def test_an_unknown_stage_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            program.main(["--stages", "nothing"])
        assert "throughput" in capsys.readouterr().err

    def test_all_stages_fit_the_time_limit(self) -> None:
        """Limits are generous estimates; a GPU below 56 GiB skips the longest step."""
        for stage in stages(rehearsal=False):
            assert max(each.seconds for each in stage.steps) <= 60 * program.MINUTES / 2

    def test_on_a_machine_without_a_gpu_none_is_found(self) -> None:
        from benchmarks.gpu.machine import describe, find_gpu

        found = find_gpu()
        assert found is None or isinstance(found, GPU)
        described = describe(found, rehearsed=True)
        assert described["vllm"] and described["torch"] and described["commit"]


@pytest.mark.slow
def test_the_rehearsal_ends_in_ten_minutes_with_every_step_done_or_skipped(
    tmp_path: Path,
) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--rehearse", "--minutes", "10"]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, check=True)
    assert time.monotonic() - begun < 600
    found = read(tmp_path / "results.json")
    planned = {each.name for stage in stages(rehearsal=True) for each in stage.steps}
    assert set(found.steps) == planned
    for name, result in found.steps.items():
        assert result.status == "done" or (result.status == "skipped" and result.reason), name
    engine = "v1-bf16-graphs"
    for name in (
        keys.of(engine, keys.RUNNER),
        keys.of(engine, keys.COUNTS_EXACT),
        keys.of(engine, keys.MIXED_EXACT),
        keys.of(engine, keys.PREFIX_CACHE),
        keys.of(engine, keys.EQUALS_STOCK),
        keys.of("v1-chunks", keys.CHUNKED),
        keys.of("qwen2.5-vl-v1-eager", keys.TESTS),
    ):
        assert found.figures[name].value is True, (name, found.figures[name].conditions)
    # On a CPU these are the same questions to the same model, so all answers are as expected.
    for budget in (None, *BUDGETS):
        assert "6 the same" in found.figures[keys.of(engine, keys.accuracy(budget))].conditions
    assert (tmp_path / "report.md").read_text().count("| not run |") > 0
    assert (tmp_path / "plot.png").exists()
    assert list((tmp_path / "logs").glob("*.log"))
