# SPDX-License-Identifier: Apache-2.0
"""The demo without a server: its table, its metrics, its picture, its exit codes."""

import io
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from demo import __main__ as demo
from demo import measure, picture
from demo.conversation import TURNS, Turn, converse
from demo.measure import Answer, DemoError, Meter
from demo.report import Progress, conversation_table, table
from demo.world import picture_of
from testing.photo import photo
from testing.server import ServerError

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {usage}
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{{engine="0",model_name="m"}} 32.0
# TYPE vllm:mm_cache_hits counter
vllm:mm_cache_hits_total{{engine="0",model_name="m"}} 1.0
# TYPE flashvlm_feature_cache_hits gauge
flashvlm_feature_cache_hits{{engine="0",model_name="m"}} 2.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="32",cache_dtype="auto",num_gpu_blocks="1024"}} 1.0
"""


TALK: dict[int | None, list[Turn]] = {
    None: [Turn(586, 0), Turn(1172, 576)],
    64: [Turn(74, 0), Turn(148, 64)],
}


def cost(**changes: Any) -> Answer:
    usual: dict[str, Any] = {
        "text": "a rocket near the river",
        "prompt_tokens": 590,
        "visual_tokens": 576,
        "kept_tokens": 576,
        "kv_blocks": 20,
        "ttft_ms": 240.0,
        "prefix_hits": 0,
        "image_hits": 0,
        "feature_hits": 0,
    }
    return Answer(**(usual | changes))


def serve_metrics(monkeypatch: pytest.MonkeyPatch, *pages: str) -> None:
    """Serve these pages one after the other, and the last one repeatedly."""
    left = list(pages)

    def page(*_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO((left.pop(0) if len(left) > 1 else left[0]).encode())

    monkeypatch.setattr(measure, "urlopen", page)


def test_the_table_has_a_row_per_budget_with_median_time_and_maximum_blocks() -> None:
    answers = {
        None: [cost(ttft_ms=300.4), cost(ttft_ms=100), cost(ttft_ms=200, kv_blocks=21)],
        64: [cost(prompt_tokens=78, kept_tokens=64, kv_blocks=4, ttft_ms=90)],
    }
    assert table(answers).splitlines() == [
        "budget  prompt tokens  visual tokens kept  KV blocks  TTFT ms  answer",
        "------  -------------  ------------------  ---------  -------  -----------------------",
        "  none            590          576 of 576         21      200  a rocket near the river",
        "    64             78           64 of 576          4       90  a rocket near the river",
    ]


def test_the_table_truncates_a_long_answer() -> None:
    (*_, row) = table({32: [cost(text="many words " * 20)]}).splitlines()
    assert row.endswith("many words ...") and len(row) < 110


def test_progress_lines_begin_with_the_elapsed_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress().waiting("starting", every=0.01):
        time.sleep(0.1)
    first, *more = capsys.readouterr().out.splitlines()
    assert first == "[  0.0 s] starting"
    assert more and all(line.endswith("...") for line in more)


def test_kv_blocks_are_computed_from_the_usage_without_the_null_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_metrics(monkeypatch, METRICS.format(running=1.0, usage=20 / 1023))
    meter = Meter("http://localhost")
    assert meter.block_size == 32
    assert meter.read() == measure.Load(
        running=1, kv_blocks=20, prefix_hits=32, image_hits=1, feature_hits=2
    )


@pytest.mark.parametrize(
    "missing",
    ["vllm:cache_config_info", "vllm:kv_cache_usage_perc", "flashvlm_feature_cache_hits"],
)
def test_a_missing_metric_is_named_in_the_error(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    page = METRICS.format(running=0.0, usage=0.0)
    lines = [line for line in page.splitlines(keepends=True) if not line.startswith(missing)]
    serve_metrics(monkeypatch, "".join(lines))
    with pytest.raises(DemoError, match=missing):
        Meter("http://localhost").read()


def test_an_unknown_number_of_blocks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    page = METRICS.format(running=0.0, usage=0.0).replace('"1024"', '"None"')
    serve_metrics(monkeypatch, page)
    with pytest.raises(DemoError, match="no number of KV blocks"):
        Meter("http://localhost")


class Client:
    """An OpenAI client that answers with two words and a usage.

    Its prefix cache has all of a prompt but the last picture's tokens.
    """

    def __init__(self, visual_tokens: dict[str, Any] | None, *, caches: bool = True) -> None:
        self.sent: dict[str, Any] = {}
        self.conversations: list[tuple[int | None, list[dict[str, Any]]]] = []
        self._caches = caches
        self._usage = SimpleNamespace(prompt_tokens=78, visual_tokens=visual_tokens)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    def _create(self, **fields: Any) -> Any:
        self.sent = fields
        return self._stream() if fields.get("stream") else self._answer(**fields)

    def _answer(
        self, messages: list[dict[str, Any]], extra_body: dict[str, Any], **_: Any
    ) -> SimpleNamespace:
        budget = extra_body.get("visual_budget")
        self.conversations.append((budget, list(messages)))
        tokens, turn = budget or 576, 1 + len(messages) // 2
        details = SimpleNamespace(cached_tokens=tokens * (turn - 1))
        usage = SimpleNamespace(
            prompt_tokens=tokens * turn + 10,
            prompt_tokens_details=details if self._caches and turn > 1 else None,
        )
        message = SimpleNamespace(content=f"answer {turn}")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)

    def _stream(self) -> Iterator[Any]:
        for word in ("", " near", " river"):
            yield SimpleNamespace(
                choices=[SimpleNamespace(delta=SimpleNamespace(content=word))], usage=None
            )
        yield SimpleNamespace(choices=[], usage=self._usage)


@pytest.fixture
def idle_then_running(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = METRICS.format(running=0.0, usage=0.0)
    two = METRICS.format(running=1.0, usage=2 / 1023)
    # With another request running, the used blocks are not those of this request.
    disturbed = METRICS.format(running=2.0, usage=9 / 1023)
    serve_metrics(monkeypatch, idle, idle, two, disturbed, idle)


@pytest.mark.usefixtures("idle_then_running")
def test_ask_measures_blocks_only_while_its_request_is_the_only_one() -> None:
    client = Client({"total": 576, "kept": 64, "images": []})
    answer = measure.ask(client, Meter("http://localhost"), "m", "data:", "what?", 64)
    assert client.sent["extra_body"] == {"ignore_eos": True, "visual_budget": 64}
    assert (answer.kv_blocks, answer.kept_tokens, answer.text) == (2, 64, "near river")
    assert answer.ttft_ms > 0 and answer.prefix_hits == 0


@pytest.mark.usefixtures("idle_then_running")
def test_without_budget_ask_sends_no_field_and_a_missing_usage_is_an_error() -> None:
    client = Client(None)
    with pytest.raises(DemoError, match="plugin is not enabled"):
        measure.ask(client, Meter("http://localhost"), "m", "data:", "what?", None)
    assert "visual_budget" not in client.sent["extra_body"]


def test_ask_requires_an_idle_server(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_metrics(monkeypatch, METRICS.format(running=1.0, usage=0.0))
    with pytest.raises(DemoError, match="another request is running"):
        measure.ask(Client({}), Meter("http://localhost"), "m", "data:", "what?", 1)


def test_unmeasured_blocks_are_an_error_and_not_shown_as_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_metrics(monkeypatch, METRICS.format(running=0.0, usage=0.0))
    monkeypatch.setattr(demo, "OpenAI", lambda **_: Client({"total": 576, "kept": 64}))
    server: Any = SimpleNamespace(url="http://localhost", model="m")
    with pytest.raises(DemoError, match="never showed the KV blocks"):
        demo.talk(Progress(), server)
    assert "budget  " not in capsys.readouterr().out


def test_times_are_taken_after_a_warm_up_on_new_pictures_with_each_budget_first_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, int | None]] = []

    def answer(
        image_url: str, question: str, budget: int | None, selector: str | None = None
    ) -> Answer:
        asked.append((image_url, budget))
        return cost(ttft_ms=float(len(asked)))

    answers = demo.compare(Progress(), answer)
    count = len(demo.BUDGETS)
    assert len(asked) == count * len(demo.SEEDS)
    assert len({url for url, _ in asked}) == len(asked), "a cache has seen a picture"
    timed = sorted(one.ttft_ms for repeated in answers.values() for one in repeated)
    assert timed == [float(number) for number in range(count + 1, len(asked) + 1)]
    assert {budget for _, budget in asked[:count]} == set(demo.BUDGETS)
    first = [budget for _, budget in asked[count::count]]
    assert sorted(first, key=str) == sorted(demo.BUDGETS, key=str)
    assert "warming up" in capsys.readouterr().out


def test_copies_of_a_picture_differ_in_one_pixel() -> None:
    copies = [np.asarray(picture_of(5, copy), dtype=int) for copy in range(8)]
    for number, one in enumerate(copies):
        for other in copies[:number]:
            assert np.count_nonzero((one != other).any(axis=2)) == 1
            assert np.abs(one - other).max() <= 7


def test_the_legend_counts_what_was_taken_from_caches() -> None:
    answers = {None: [cost(), cost(image_hits=1)], 64: [cost(prefix_hits=32, feature_hits=3)] * 2}
    text = demo.legend(answers, block_size=32)
    assert "median of 2 calls after a warm-up" in text
    taken = " ".join(text.split("Taken from caches ")[1].split())
    assert taken == "in all 4 calls: 64 prompt tokens, 1 preprocessed images, 6 encoded images"


def test_a_conversation_repeats_all_turns_and_counts_the_tokens_outside_the_prefix_cache() -> None:
    client = Client(None)
    turns = converse(client, "m", 64)
    assert turns == [Turn(74, 0), Turn(138, 64), Turn(202, 128)]
    assert [turn.computed for turn in turns] == [74, 74, 74]
    sent = [messages for _, messages in client.conversations]
    assert [len(messages) for messages in sent] == [1, 3, 5]
    assert sent[2][:3] == sent[1] and sent[1][1] == {"role": "assistant", "content": "answer 1"}
    urls = [message["content"][0]["image_url"]["url"] for message in sent[2][::2]]
    assert len(set(urls)) == TURNS == 3


def test_a_server_that_reports_no_cached_tokens_is_an_error() -> None:
    with pytest.raises(DemoError, match="in the prefix cache"):
        converse(Client(None, caches=False), "m", None)


def test_the_table_of_a_conversation_has_the_tokens_computed_by_turn() -> None:
    conversations = {
        None: [Turn(586, 0), Turn(1172, 576), Turn(1767, 1160)],
        64: [Turn(74, 0), Turn(148, 64), Turn(223, 128)],
    }
    assert conversation_table(conversations).splitlines() == [
        "budget  computed in turn 1  computed in turn 2  computed in turn 3  in all  last prompt",
        "------  ------------------  ------------------  ------------------  ------  -----------",
        "  none                 586                 596                 607    1789         1767",
        "    64                  74                  84                  95     253          223",
    ]


def test_all_requests_are_sent_and_both_tables_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = METRICS.format(running=0.0, usage=0.0)
    two = METRICS.format(running=1.0, usage=2 / 1023)
    serve_metrics(monkeypatch, idle, *[idle, two, two, idle] * len(demo.SEEDS) * len(demo.BUDGETS))
    client = Client({"total": 576, "kept": 64})
    monkeypatch.setattr(demo, "OpenAI", lambda **_: client)
    monkeypatch.setattr(demo, "look", lambda *_: picture.Selection("what?", [0], 576))
    server: Any = SimpleNamespace(url="http://localhost", model="m")
    demo.talk(Progress(), server)
    printed = capsys.readouterr().out
    assert [budget for budget, _ in client.conversations] == [None] * TURNS + [64] * TURNS
    own = {budget: converse(client, "m", budget) for budget in (None, demo.PICTURE_BUDGET)}
    assert conversation_table(own) in printed
    assert "visual_steering" in printed and "stock" in printed
    assert "visual tokens kept" in printed
    assert "--enable-prompt-tokens-details" in demo.ARGUMENTS


@pytest.mark.parametrize("name", ["astronaut", "cat", "motorcycle"])
def test_the_crop_equals_that_of_clip(name: str) -> None:
    original = photo(name)
    ours = np.asarray(picture.as_the_tower_sees_it(original), dtype=int)
    clip = CLIPImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        do_normalize=False,
        do_rescale=False,
    )
    theirs = clip(original, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert ours.shape == theirs.shape
    # Resampling differs by rounding; an offset of one pixel would differ far more.
    assert np.abs(ours - theirs.astype(int)).mean() < 1


def test_kept_patches_are_brighter_in_the_picture(tmp_path: Path) -> None:
    grey = Image.new("RGB", (400, 500), (160, 140, 120))
    first = picture.Selection("left?", [0, 25, 575], 576)
    second = picture.Selection("right?", [0, 30, 575], 576)
    picture.write(tmp_path / "kept.png", grey, first, second, TALK, "a note")

    figure = picture.compose(grey, first, second, TALK, "a note")
    pixels = np.asarray(Image.open(tmp_path / "kept.png").convert("L"), dtype=int)
    for panel, selection in zip(figure.axes[:2], (first, second), strict=True):
        for patch in range(576):
            row, column = divmod(patch, 24)
            x, y = panel.transData.transform((14 * column + 6.5, 14 * row + 6.5))
            value = pixels[pixels.shape[0] - round(y), round(x)]
            assert abs(value - (143 if patch in selection.kept else 143 * picture.DIMMED)) < 5


def test_the_picture_shows_questions_counts_and_difference() -> None:
    first = picture.Selection("left?", [0, 1, 2], 576)
    second = picture.Selection("right?", [0, 8, 9], 576)
    figure = picture.compose(Image.new("RGB", (336, 336)), first, second, TALK, "a note")
    titles = [panel.get_title() for panel in figure.axes[:2]]
    assert titles == ["“left?”\n3 of 576 patches kept", "“right?”\n3 of 576 patches kept"]
    texts = [text.get_text() for text in figure.texts]
    assert texts == [
        "One picture, two questions: 2 of the 3 kept patches differ",
        "A conversation with pictures",
        "a note",
    ]
    bars = [text.get_text() for text in figure.axes[2].texts]
    assert bars == [str(turn.computed) for turns in TALK.values() for turn in turns]


def test_a_number_of_patches_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="575 patches"):
        picture.dim_dropped(Image.new("RGB", (336, 336)), picture.Selection("?", [0], 575))


def test_a_selection_is_read_from_the_single_new_trace_line() -> None:
    line = json.dumps({"total": 576, "kept": [3, 5], "query": [7]})
    assert demo.selection("what?", [line]) == picture.Selection("what?", [3, 5], 576)
    with pytest.raises(DemoError, match="not 0"):
        demo.selection("what?", [])


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Replace the slow parts of the demo; return the events of its server."""
    events: list[str] = []

    class Server:
        url = "http://localhost"

        def __init__(self, *_: Any, log: Path, **__: Any) -> None:
            self._log = log

        def __enter__(self) -> "Server":
            events.append("started")
            self._log.touch()
            return self

        def __exit__(self, *_: object) -> None:
            events.append("stopped")

    monkeypatch.setattr(demo, "Server", Server)
    monkeypatch.setattr(demo, "entry_points", lambda **_: ["flashvlm"])
    monkeypatch.setattr(demo, "LOG", tmp_path / "server.log")
    monkeypatch.setattr(demo, "PICTURE", tmp_path / "kept.png")
    monkeypatch.setattr(demo, "TRACE", tmp_path / "trace" / "rank-0.jsonl")
    handlers = {number: signal.getsignal(number) for number in demo.ENDINGS}
    yield events
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_on_success_the_picture_is_drawn_after_the_server_stopped(
    stage: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    selections = [picture.Selection(each.question, [0, 1], 576) for each in demo.QUESTIONS]
    monkeypatch.setattr(demo, "talk", lambda *_: (*selections, TALK))
    assert demo.main() == 0
    assert stage == ["started", "stopped"]
    assert demo.PICTURE.stat().st_size > 0
    printed = capsys.readouterr().out
    assert "kept.png" in printed and "server.log" in printed and "s in total" in printed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DemoError("no answer"), "demo failed: no answer"),
        (OSError("disk full"), "demo failed: disk full"),
        (ZeroDivisionError("a mistake"), "demo failed: a mistake"),
    ],
)
def test_on_failure_the_server_stops_and_the_exit_code_is_one(
    stage: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    def talk(*_: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "talk", talk)
    demo.PICTURE.write_text("of an earlier run")
    assert demo.main() == 1
    assert stage == ["started", "stopped"]
    assert message in capsys.readouterr().err
    assert not demo.PICTURE.exists()


@pytest.mark.parametrize("ending", demo.ENDINGS)
def test_a_signal_stops_the_server_and_a_second_one_does_not_interrupt_this(
    stage: list[str], monkeypatch: pytest.MonkeyPatch, ending: signal.Signals
) -> None:
    def stop(self: Any, *_: object) -> None:
        signal.raise_signal(ending)
        stage.append("stopped")

    monkeypatch.setattr(demo.Server, "__exit__", stop)  # type: ignore[attr-defined]
    monkeypatch.setattr(demo, "talk", lambda *_: signal.raise_signal(ending))
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 128 + ending
    assert stage == ["started", "stopped"]


@pytest.mark.usefixtures("stage")
def test_a_server_that_does_not_start_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ServerError("the server ended at start")

    monkeypatch.setattr(demo, "Server", refuse)
    assert demo.main() == 1
    assert "demo failed: the server ended at start" in capsys.readouterr().err


def test_a_missing_plugin_is_reported_before_anything_starts(
    stage: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "entry_points", lambda **_: [])
    assert demo.main() == 1
    assert not stage
    assert "pip install -e ." in capsys.readouterr().err
