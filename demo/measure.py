# SPDX-License-Identifier: Apache-2.0
"""One request, and its costs from the answer and ``/metrics``."""

import time
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

ANSWER_TOKENS = 24


class DemoError(RuntimeError):
    """Something that the demo should show did not happen."""


@dataclass(frozen=True)
class Load:
    """The load of a server at one time."""

    running: int
    kv_blocks: int
    prefix_hits: int
    """Prompt tokens taken from the prefix cache since the server started."""
    image_hits: int
    """Images taken from the cache of preprocessed ones since then."""
    feature_hits: int
    """Images with a budget whose features were in the plugin's cache since then."""


@dataclass(frozen=True)
class Answer:
    """The answer to one request, and its costs."""

    text: str
    prompt_tokens: int
    visual_tokens: int
    kept_tokens: int
    kv_blocks: int
    """0: the request ended before the metrics showed it running."""
    ttft_ms: float
    prefix_hits: int
    image_hits: int
    feature_hits: int


Sample = tuple[float, dict[str, str]]
"""Value and labels."""


def samples(text: str) -> dict[str, Sample]:
    """The samples of a metrics page by name; the first where a name has several."""
    found: dict[str, Sample] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, (sample.value, sample.labels))
    return found


class Meter:
    """Reads the load of a server with one engine."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"
        _, labels = self._sample(self._page(), "vllm:cache_config_info")
        try:
            self.block_size = int(labels["block_size"])
            # One block is vLLM's null block: never given out, and not part of the usage's 100 %.
            self._usable_blocks = int(labels["num_gpu_blocks"]) - 1
        except (KeyError, ValueError) as error:
            raise DemoError(f"the server reports no number of KV blocks: {error}") from None

    def read(self) -> Load:
        """Read the metrics."""
        page = self._page()
        usage, _ = self._sample(page, "vllm:kv_cache_usage_perc")
        running, _ = self._sample(page, "vllm:num_requests_running")
        prefix_hits, _ = self._sample(page, "vllm:prefix_cache_hits_total")
        image_hits, _ = self._sample(page, "vllm:mm_cache_hits_total")
        feature_hits, _ = self._sample(page, "flashvlm_feature_cache_hits")
        return Load(
            running=int(running),
            kv_blocks=round(usage * self._usable_blocks),
            prefix_hits=int(prefix_hits),
            image_hits=int(image_hits),
            feature_hits=int(feature_hits),
        )

    def _page(self) -> dict[str, Sample]:
        with urlopen(self._url, timeout=10) as response:
            return samples(response.read().decode())

    def _sample(self, page: dict[str, Sample], name: str) -> Sample:
        if name not in page:
            raise DemoError(f"{self._url} has no {name}")
        return page[name]


def ask(
    client: Any,
    meter: Meter,
    model: str,
    image_url: str,
    question: str,
    budget: int | None,
    selector: str | None = None,
) -> Answer:
    """Stream one answer and read the use of the KV cache during it."""
    before = meter.read()
    if before.running:
        raise DemoError("another request is running; its KV blocks would be counted, too")
    parts = [
        {"type": "image_url", "image_url": {"url": image_url}},
        {"type": "text", "text": question},
    ]
    # The field itself, as OpenAI clients pass fields that the library does not have.
    fields = {"visual_budget": budget, "visual_selector": selector}
    extra: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # All outputs have the same length, long enough to read the metrics.
        extra_body={"ignore_eos": True, **extra},
    )
    words: list[str] = []
    blocks: list[int] = []
    usage: Any = None
    ttft = 0.0
    for chunk in stream:
        usage = chunk.usage or usage
        if not chunk.choices or not chunk.choices[0].delta.content:
            continue
        ttft = ttft or time.perf_counter() - started
        words.append(chunk.choices[0].delta.content)
        # Only after the first token, so that TTFT is not affected.
        load = meter.read()
        if load.running == 1:
            blocks.append(load.kv_blocks)
    if not words or usage is None:
        raise DemoError("the server sent no answer")
    counts = getattr(usage, "visual_tokens", None)
    if not counts:
        raise DemoError("the answer's usage has no visual_tokens: the plugin is not enabled")
    after = meter.read()
    return Answer(
        text="".join(words).strip(),
        prompt_tokens=usage.prompt_tokens,
        visual_tokens=counts["total"],
        kept_tokens=counts["kept"],
        kv_blocks=max(blocks, default=0),
        ttft_ms=1000 * ttft,
        prefix_hits=after.prefix_hits - before.prefix_hits,
        image_hits=after.image_hits - before.image_hits,
        feature_hits=after.feature_hits - before.feature_hits,
    )
