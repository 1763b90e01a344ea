# SPDX-License-Identifier: Apache-2.0
"""The public benchmarks without a server: commands, results, refused arguments.

Tests that need lmms-eval are skipped if it is not installed; it has its own environment.
"""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks.public import run as command_line
from benchmarks.public.cells import ROOT, TASKS, Cell, Setting, Target, plan, settings
from benchmarks.public.figures import as_json, markdown
from benchmarks.public.flashvlm_lmms_eval.request import Costs, visual_fields
from benchmarks.public.scenes import FOLDER, write_scenes
from benchmarks.public.tables import TABLES, Table, Task
from benchmarks.public.tasks.drawn_scenes import utils

ADAPTER = ROOT / "benchmarks" / "public"
REQUIRED = {
    *("VQAv2", "GQA", "VizWiz", "ScienceQA-IMG", "TextVQA", "POPE", "MME"),
    *("MMBench", "MMBench-CN", "MM-Vet"),
    *("TGIF-QA", "MSVD-QA", "MSRVTT-QA", "ActivityNet-QA"),
    *("OCRBench", "DocVQA", "ChartQA"),
}


def cells_of(name: str, rows: list[Setting], folder: Path, **target: Any) -> list[Cell]:
    return plan(TABLES[name], Target(**target), rows, folder, "python")


# Tables


def test_the_tables_have_all_required_benchmarks() -> None:
    covered = {task.dataset for table in TABLES.values() for task in table.tasks}
    assert covered == REQUIRED | {"scenes"}


def test_a_table_has_distinct_columns_and_begins_with_the_unpruned_row() -> None:
    for table in TABLES.values():
        assert len({task.dataset for task in table.tasks}) == len(table.tasks)
        assert table.budgets[0] is None


def test_without_pruning_there_is_one_row_for_all_selectors() -> None:
    rows = settings([None, 128, 0.25], ["flashvlm", "prumerge+"])
    assert [row.name for row in rows] == [
        "none",
        *("flashvlm-128", "prumerge+-128"),
        *("flashvlm-0.25", "prumerge+-0.25"),
    ]


# Commands


def test_a_command_passes_budget_and_selector_to_the_server(tmp_path: Path) -> None:
    rows = [Setting(None, None), Setting(64, "flashvlm")]
    first, second = cells_of("scenes", rows, tmp_path, server="http://host:8000/", extra="a=b")
    assert first.command[:5] == ["python", "-m", "lmms_eval", "--model", "flashvlm_server"]
    arguments = [cell.command[cell.command.index("--model_args") + 1] for cell in (first, second)]
    report = f"report={tmp_path}/{{}}/drawn_scenes/costs.json,a=b"
    base = "base_url=http://host:8000/v1"
    assert arguments[0] == f"{base},visual_budget=none,{report.format('none')}"
    chosen = "visual_budget=64,visual_selector=flashvlm"
    assert arguments[1] == f"{base},{chosen},{report.format('flashvlm-64')}"


def test_a_table_runs_every_available_task_in_every_row(tmp_path: Path) -> None:
    rows = settings([None, 64], ["flashvlm", "vispruner"])
    assert len(cells_of("1", rows, tmp_path, server="http://host")) == 3 * 10
    videos = cells_of("2", rows, tmp_path, server="http://host")
    assert [cell.task.name for cell in videos] == ["activitynetqa"] * 3
    assert all("max_frames_num=8" in " ".join(cell.command) for cell in videos)


def test_offline_the_plugin_is_enabled_and_the_model_is_passed(tmp_path: Path) -> None:
    (cell,) = cells_of("scenes", [Setting(0.5, "random")], tmp_path, model="weights")
    assert "flashvlm_llm" in cell.command
    assert "model=weights,visual_budget=0.5,visual_selector=random" in " ".join(cell.command)
    assert Target(model="weights").environment == {"VLLM_PLUGINS": "flashvlm"}
    assert Target(server="http://host").environment == {}


def test_a_dry_run_prints_one_command_per_cell(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--table 1 --server http://host --budgets none 64 --selectors flashvlm --dry-run"
    assert command_line.main(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert all(" -m lmms_eval --model flashvlm_server " in line for line in lines)


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ("--budgets 0", "1 or more"),
        ("--budgets 1.0", "say 1 to keep one token per image"),
        ("--budgets many", "a fraction strictly between 0 and 1"),
        ("--limit 0", "1 or more"),
        ("--tasks gsm8k --dry-run", "allowed in this table: gqa, mmbench_cn_dev"),
        ("--output a,b --dry-run", "comma"),
        ("--llm weights", "not allowed with"),
        ("--table 3", "choose from"),
    ],
)
def test_invalid_arguments_are_refused_with_the_allowed_values(
    wrong: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--table", "1", "--server", "http://host", *wrong.split()])
    assert allowed in capsys.readouterr().err


def test_without_lmms_eval_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "NEEDED", ("pytest", "no-such-package"))
    with pytest.raises(SystemExit):
        command_line.main(["--table", "1", "--server", "http://host"])
    message = capsys.readouterr().err
    assert "has no no-such-package: `pip install" in message


# Results


def finished(task: Task, setting: Setting, score: float, folder: Path, **costs: int) -> Cell:
    """Return a cell whose folder has the files that lmms-eval and the adapter write."""
    folder = folder / setting.name / str(task.name)
    cell = Cell(task, setting, folder, ["true"])
    (folder / "some__model").mkdir(parents=True)
    results = {
        "results": {task.name: {"alias": "x", f"{task.metric},none": score, "other,none": None}},
        "n-samples": {task.name: {"original": 100, "effective": 4}},
    }
    (folder / "some__model" / "20990101_results.json").write_text(json.dumps(results))
    (folder / "costs.json").write_text(json.dumps(costs))
    assert cell.read()
    return cell


def test_a_table_shows_scores_their_share_of_unpruned_and_token_counts(tmp_path: Path) -> None:
    one, two, absent = Task("One", "one"), Task("Two", "two", "points", 1.0), Task("Three", None)
    table = Table("a trial", (one, two, absent), (None, 64))
    whole, pruned = Setting(None, None), Setting(64, "flashvlm")
    costs = {"requests": 4, "prompt_tokens": 400, "images": 4}
    cells = [
        finished(one, whole, 0.5, tmp_path, visual_tokens_kept=2304, **costs),
        finished(two, whole, 1000, tmp_path, visual_tokens_kept=2304, **costs),
        finished(one, pruned, 0.4, tmp_path, visual_tokens_kept=256, **costs),
        finished(two, pruned, 900, tmp_path, visual_tokens_kept=256, failed=3, **costs),
    ]
    lines = markdown(table, cells).splitlines()
    assert lines[2] == "| none | - | 50.0 | 1000.0 | 100.0 % | 576.0 | 100.0 |"
    assert lines[3].startswith("| 64 | flashvlm | 40.0 | 900.0 (3 requests failed) | 85.0 % | 64.0")
    assert lines[-1] == "Not in lmms-eval: Three."
    assert {row.count("|") for row in lines[:4]} == {8}
    assert [cell.error is None for cell in cells] == [True, True, True, False]
    assert as_json(cells)[0]["metrics"] == {"exact_match": 0.5}
    json.dumps(as_json(cells))


def test_a_run_without_results_has_failed_whatever_its_exit_status(tmp_path: Path) -> None:
    script = "print('ValueError: no such budget'); print('bye')"
    task, setting = Task("One", "one"), Setting(64, "flashvlm")
    cell = Cell(task, setting, tmp_path, [sys.executable, "-c", script])
    cell.run({})
    assert cell.error is not None
    assert cell.error.startswith("exit status 0, ValueError: no such budget")
    assert "| failed |" in markdown(Table("", (task,), (64,)), [cell])


def test_results_of_an_earlier_run_are_not_used(tmp_path: Path) -> None:
    cell = finished(Task("One", "one"), Setting(None, None), 0.5, tmp_path, requests=4)
    cell.command = [sys.executable, "-c", "pass"]
    cell.run({})
    assert cell.error is not None
    assert cell.score is None
    assert not cell.read()


def test_a_task_without_its_judge_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judged = next(task for task in TABLES["1"].tasks if task.dataset == "MM-Vet")
    cell = Cell(judged, Setting(64, "flashvlm"), tmp_path, ["no-such-command"])
    cell.run({})
    assert cell.error == "not run: this task needs OPENAI_API_KEY in the environment"


# The local task


def test_scenes_are_written_deterministically_and_read_by_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = write_scenes(tmp_path, scenes=3, per_scene=2, seed=7)
    lines = (tmp_path / "questions.jsonl").read_text()
    write_scenes(tmp_path, scenes=3, per_scene=2, seed=7)
    assert (tmp_path / "questions.jsonl").read_text() == lines
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == count == 6
    assert len({row["picture"] for row in rows}) == 3

    monkeypatch.setattr(utils, "SCENES", tmp_path)
    (image,) = utils.picture(rows[0])
    assert isinstance(image, Image.Image)
    assert image.size == (168, 168)
    assert utils.words(rows[0]) == rows[0]["question"]


def test_pictures_of_earlier_scenes_are_removed(tmp_path: Path) -> None:
    write_scenes(tmp_path, scenes=3, per_scene=1, seed=0)
    write_scenes(tmp_path, scenes=2, per_scene=1, seed=0)
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    with pytest.raises(ValueError, match="scenes must be 1 or more"):
        write_scenes(tmp_path, scenes=0, per_scene=1, seed=0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("top left", 1.0), (" Top  left.\n", 1.0), ("left", 0.0), ("top left corner", 0.0), ("", 0.0)],
)
def test_answers_are_compared_word_by_word(answer: str, right: float) -> None:
    assert utils.score({"answer": "top left"}, [answer]) == {"exact_match": right}


def test_the_task_reads_the_folder_that_the_writer_uses() -> None:
    text = (ROOT / TASKS / "drawn_scenes" / "drawn_scenes.yaml").read_text()
    task = yaml.safe_load(text.replace("!function ", ""))
    assert ROOT / task["dataset_kwargs"]["data_files"]["test"] == FOLDER / "questions.jsonl"
    assert utils.SCENES == FOLDER
    assert FOLDER.is_relative_to(ROOT / "benchmarks" / "output")  # ignored by git


# The adapter


def test_model_arguments_become_request_fields() -> None:
    assert visual_fields(64) == {"visual_budget": 64}
    assert visual_fields(0.25, "prumerge+")["visual_selector"] == "prumerge+"
    # Null, not absent: otherwise a server's default would apply to an unpruned run.
    assert visual_fields("none") == {"visual_budget": None}


@pytest.mark.parametrize("budget", [0, -3.0, 1.0, 1.5, 64.0, True, "many", float("nan")], ids=repr)
def test_an_invalid_budget_is_refused(budget: object) -> None:
    with pytest.raises(ValueError, match=r"1 or more|say 1 to keep one"):
        visual_fields(budget)
    with pytest.raises(ValueError, match="by its name"):
        visual_fields(64, 5)


def test_costs_are_summed_and_missing_counts_are_null(tmp_path: Path) -> None:
    costs = Costs()
    costs.add(80)
    costs.write(tmp_path / "costs.json", model="m")
    assert json.loads((tmp_path / "costs.json").read_text()) == {
        "model": "m", "requests": 1, "failed": 0, "prompt_tokens": 80,
        "images": None, "visual_tokens": None, "visual_tokens_kept": None,
    }  # fmt: skip
    costs.add(90, {"total": 1152, "kept": 128, "images": [{}, {}]})
    assert (costs.requests, costs.images, costs.visual_tokens_kept) == (2, 2, 128)


# With lmms-eval


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("lmms_eval")
    monkeypatch.syspath_prepend(str(ADAPTER))
    yield


def test_lmms_eval_finds_the_models_by_their_entry_point(adapter: None) -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    settings = tomllib.loads((ADAPTER / "pyproject.toml").read_text())
    (entry,) = settings["project"]["entry-points"]["lmms_eval.models"].values()
    assert entry == "flashvlm_lmms_eval:manifests"

    from flashvlm_lmms_eval import manifests

    registry = ModelRegistryV2()
    for manifest in manifests():
        registry.register_manifest(manifest)
    for name in ("flashvlm_server", "flashvlm_llm"):
        assert not registry.get_model_class(name).is_simple


def test_lmms_eval_has_the_tasks_and_their_metrics(
    adapter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {name for table in TABLES.values() for task in table.tasks for name in task.needs}:
        monkeypatch.setenv(name, "set")
    from lmms_eval.tasks import TaskManager

    known = TaskManager("ERROR", include_path=str(ROOT / TASKS))
    for table in TABLES.values():
        for task in table.tasks:
            if task.name is None:
                # If a later lmms-eval adds the task, the table must have it, too.
                word = task.dataset.split("-")[0].lower()
                assert not [name for name in known.all_tasks if word in name.lower()]
            else:
                assert known.task_index[task.name]["type"] == "task"
                metrics = {one["metric"] for one in known._get_config(task.name)["metric_list"]}
                assert task.metric in metrics


class FakeClient:
    """Replaces the ``openai`` client; prunes or not, and records the requests."""

    def __init__(self, prunes: bool) -> None:
        self.sent: list[dict[str, Any]] = []
        self._prunes = prunes
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))
        listed = SimpleNamespace(data=[SimpleNamespace(id="/weights/o1-like")])
        self.models = SimpleNamespace(list=lambda: listed)

    def _create(self, **request: Any) -> Any:
        self.sent.append(request)
        usage = SimpleNamespace(prompt_tokens=80, completion_tokens=1)
        if self._prunes:
            usage.visual_tokens = {"total": 576, "kept": 64, "images": [{}]}
        message = SimpleNamespace(content="red")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)


def build(monkeypatch: pytest.MonkeyPatch, prunes: bool = True, **arguments: Any) -> Any:
    from flashvlm_lmms_eval.server import FlashVLMServer
    from lmms_eval.models.simple import openai

    client = FakeClient(prunes)
    monkeypatch.setattr(openai, "OpenAI", lambda **_: client)
    return FlashVLMServer(base_url="http://host/v1", **arguments), client


def test_every_request_has_the_visual_fields(
    adapter: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = tmp_path / "costs.json"
    model, client = build(
        monkeypatch, visual_budget=64, visual_selector="random", report=str(report)
    )
    content = [{"type": "text", "text": "what color?"}]
    model.task_dict = {"scenes": {"test": {0: None}}}
    messages = [{"role": "user", "content": content}]
    arguments = ("what color?", lambda _: messages, {"temperature": 0.2}, 0, "scenes", "test")
    answers = model.generate_until([SimpleNamespace(args=arguments)] * 3)

    assert [answer.text for answer in answers] == ["red"] * 3
    assert len(client.sent) == 4  # includes the trial request with one image
    for request in client.sent:
        assert request["extra_body"] == {"visual_budget": 64, "visual_selector": "random"}
        assert request["model"] == "/weights/o1-like"
    # The parent class drops the temperature for a name like OpenAI's o1.
    assert client.sent[-1]["temperature"] == 0.2
    assert json.loads(report.read_text())["visual_tokens_kept"] == 3 * 64


def test_a_server_that_does_not_prune_is_refused_before_the_run(
    adapter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--plugins flashvlm"):
        build(monkeypatch, prunes=False, visual_budget=64)
    build(monkeypatch, prunes=False)  # without a budget any server is accepted


def test_misspelt_arguments_are_refused(adapter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown: visual_bugdet; allowed: .*visual_budget"):
        build(monkeypatch, visual_bugdet=64)
    with pytest.raises(ValueError, match="1 or more"):
        build(monkeypatch, visual_budget=0)
