# SPDX-License-Identifier: Apache-2.0
"""Two servers of LLaVA-1.5-7B's shape, stock and with the plugin, that take turns under load.

Random weights: times do not depend on them. At the end a second question about an image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer

from benchmarks.efficiency.first_token import WORD
from benchmarks.efficiency.formulas import CLIP_L, LLAMA_7B
from benchmarks.efficiency.shapes import write_shape
from benchmarks.gpu import keys
from benchmarks.gpu.engines import as_flags, engine_arguments
from benchmarks.gpu.recorder import Recorder, scratch
from benchmarks.gpu.running import turn_file
from benchmarks.measuring.command import stop_servers_on_sigterm
from benchmarks.measuring.metrics import Peak, blocks_per_request, kv_blocks, page, value
from benchmarks.measuring.order import alternating
from benchmarks.measuring.pairs import compare
from benchmarks.measuring.servers import confirm, server
from benchmarks.measuring.traffic import Pictures, asked_one_by_one, closed_loop
from benchmarks.measuring.turn import Turn, percentiles
from benchmarks.serving.plan import COLUMNS, NONE, STOCK
from testing.server import Server
from testing.tiny.llava import build_llava

ON_GPU: Final = torch.cuda.is_available()
PAUSE: Final = 0.4 if ON_GPU else 1.2
"""Seconds until the processes of the server that was measured before are quiet."""
KV_GIB: Final = 11.5
"""Of each server: 23,552 tokens of a 7B in bfloat16, 38 requests without a budget."""
OUTPUT_TOKENS: Final = 16
REQUESTS: Final = {1: 6, 8: 24, 32: 64}
"""In a turn, by clients."""
MOST_ROUNDS: Final = 8
MISSES: Final = "flashvlm_feature_cache_misses"
SECOND_QUESTION: Final = "Which colour is the object in the middle?"
GRAPHS: Final = [1, 2, 4, 8, 16, 32, 64]
"""Batch sizes that CUDA graphs are captured for; fewer than vLLM's own, for a quicker start."""


class Column:
    """A server and a budget."""

    def __init__(self, name: str, urls: dict[bool, str], word: int) -> None:
        self.name = name
        self.url = urls[name != STOCK]
        # What random weights say may not be text at all: one word is allowed.
        self.fields: dict[str, Any] = {"allowed_token_ids": [word]}
        if name not in (STOCK, NONE):
            self.fields["visual_budget"] = int(name)


def write_model(rehearse: bool) -> Path:
    """Write LLaVA-1.5-7B's shape without weights, or a tiny model with some."""
    folder = scratch() / "models"
    if rehearse:
        return build_llava(folder / "throughput-tiny")
    return write_shape(
        folder / "llava-1.5-7b-shape", LLAMA_7B, CLIP_L, head=128, vision_head=64, next=False
    )


def servers(model: Path, rehearse: bool) -> dict[bool, Server]:
    """Describe stock's server (False) and the plugin's (True)."""
    arguments: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 256, "seed": 0}
    if ON_GPU:
        arguments |= {"dtype": "bfloat16", "enforce_eager": False}
        arguments |= {"cudagraph_capture_sizes": GRAPHS}
    if ON_GPU and not rehearse:
        arguments |= {"load_format": "dummy"}
    arguments |= engine_arguments(0.5 if rehearse else KV_GIB, on_gpu=ON_GPU)
    return {
        plugin: server(
            model,
            plugin=plugin,
            log=scratch() / f"throughput-{'plugin' if plugin else 'stock'}.log",
            arguments=as_flags(arguments),
        )
        for plugin in (False, True)
    }


class Rounds:
    """All turns, by clients and column."""

    def __init__(self, recorder: Recorder, columns: list[Column], pictures: Pictures) -> None:
        self._recorder = recorder
        self._columns = columns
        self._pictures = pictures
        self.turns: dict[tuple[int, str], list[Turn]] = {}
        self.prompt_tokens: dict[str, int] = {}

    def turn(self, column: Column, clients: int, requests: int) -> Turn:
        """Take one turn."""
        images = self._pictures.take(requests)
        time.sleep(PAUSE)
        turn, answers = closed_loop(column.url, images, clients, OUTPUT_TOKENS, column.fields)
        self.prompt_tokens[column.name] = answers[0].prompt_tokens
        return turn

    def run(self, number: int, requests: dict[int, int], until: float) -> bool:
        """Take a turn of every column at every load; False: the time is over."""
        order = alternating(self._columns, number)
        for clients, count in requests.items():
            taken = {}
            for column in order:
                if time.monotonic() > until:
                    return False
                taken[column.name] = self.turn(column, clients, count)
            for name, turn in taken.items():  # only whole rounds have pairs
                self.turns.setdefault((clients, name), []).append(turn)
        return True

    def write(self) -> None:
        """Write all figures of the rounds so far."""
        for (clients, name), turns in self.turns.items():
            stock = self.turns[clients, STOCK]
            how = f"rounds: {len(turns)}, {OUTPUT_TOKENS} output tokens"
            how += f", prompt of {self.prompt_tokens[name]} tokens"
            speed = statistics.median(turn.requests_per_second for turn in turns)
            self._recorder.figure(keys.throughput(name, clients), round(speed, 2), "1/s", how)
            ratio = compare(
                [turn.requests_per_second for turn in turns],
                [turn.requests_per_second for turn in stock],
            )
            if name != STOCK:
                self._recorder.figure(
                    keys.times_stock(name, clients),
                    round(ratio.median, 3),
                    "",
                    f"{ratio}; {how}",
                )
            ttft = percentiles([each for turn in turns for each in turn.ttfts])
            tpot = percentiles([each for turn in turns for each in turn.tpots])
            at = f"at {keys.clients_text(clients)}"
            for what, (median, worst) in (("TTFT", ttft), ("TPOT", tpot)):
                self._recorder.figure(
                    f"{name}: {what} {at}", round(1000 * median, 2), "ms",
                    f"median; 99th percentile {1000 * worst:.2f} ms; {how}",
                )  # fmt: skip


def residency(recorder: Recorder, rounds: Rounds, columns: list[Column], most: int) -> None:
    """Count the requests that run at once when there are more clients than fit."""
    for column in columns:
        blocks, size = kv_blocks(page(column.url))
        tokens = rounds.prompt_tokens[column.name] + OUTPUT_TOKENS
        each = blocks_per_request(tokens, size)
        fit = blocks // each
        recorder.figure(
            f"{column.name}: requests that fit into the KV cache", fit, "",
            f"{blocks} blocks of {size} tokens, {each} a request",
        )  # fmt: skip
        clients = min(most, fit + 4)
        with Peak(column.url, every=0.05) as peak:
            rounds.turn(column, clients, clients)
        recorder.figure(
            f"{column.name}: requests seen running at once", peak.running, "", f"{clients} clients"
        )


def second_question(recorder: Recorder, pictures: Pictures, columns: list[Column]) -> None:
    """Send two questions about new images; record the second's TTFT relative to the first's."""
    for column in columns:
        time.sleep(PAUSE)
        shares, firsts, seconds = [], [], []
        before = value(page(column.url), MISSES) if column.name != STOCK else 0.0
        for image in pictures.take(12):
            other = {**column.fields, "question": SECOND_QUESTION}
            first, second = asked_one_by_one(column.url, [(image, column.fields), (image, other)])
            firsts.append(first.ttft)
            seconds.append(second.ttft)
            shares.append(second.ttft / first.ttft)
        shown = (
            f"{len(shares)} images, one client; medians "
            f"{1000 * statistics.median(firsts):.1f} and {1000 * statistics.median(seconds):.1f} ms"
        )
        share = round(statistics.median(shares), 3)
        if column.name == STOCK:
            recorder.figure(f"stock: {keys.SECOND_TTFT}", share, "", shown)
            continue
        recorder.figure(keys.SECOND_TTFT, share, "", f"{column.name} tokens; {shown}")
        encoded = int(value(page(column.url), MISSES) - before) - len(shares)
        recorder.figure(keys.SECOND_ENCODED, encoded, "", f"of {len(shares)}")


def main() -> int:
    """Start both servers, wait for the turn, measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="from the turn's begin")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, one short round")
    asked = parser.parse_args()
    stop_servers_on_sigterm()
    recorder = Recorder("throughput", "random weights")
    model = write_model(asked.rehearse)
    (word,) = AutoTokenizer.from_pretrained(model).encode(WORD, add_special_tokens=False)
    requests = {1: 2, 4: 4} if asked.rehearse else REQUESTS
    with ExitStack() as stack:
        described = servers(model, asked.rehearse)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(stack.enter_context, described.values()))
        while not turn_file(scratch(), "throughput").exists():
            time.sleep(0.2)
        until = time.monotonic() + asked.seconds - 45
        urls = {plugin: each.url for plugin, each in described.items()}
        for plugin, url in urls.items():
            confirm(url, plugin=plugin)
        columns = [Column(name, urls, word) for name in COLUMNS]
        pictures = Pictures(336, different=24)
        rounds = Rounds(recorder, columns, pictures)
        with recorder.part("warm-up"):
            for column in columns:
                for clients in requests:
                    rounds.turn(column, clients, 2 * clients)
        with recorder.part("rounds"):
            for number in range(1 if asked.rehearse else MOST_ROUNDS):
                if not rounds.run(number, requests, until):
                    break
                rounds.write()
        ends = [columns[0], next(each for each in columns if each.name == "64")]
        with recorder.part("second question"):
            second_question(recorder, pictures, ends)
        with recorder.part("residency"):
            residency(recorder, rounds, ends, most=8 if asked.rehearse else 256)
    return recorder.finish()


if __name__ == "__main__":
    sys.exit(main())
