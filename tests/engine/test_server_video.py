# SPDX-License-Identifier: Apache-2.0
"""Videos over HTTP: counts in the usage, metrics, and unusual inputs."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError
from PIL import Image

from testing.photo import data_url, photo
from testing.server import Server
from testing.tiny.onevision import FRAME_TOKENS, build_onevision
from tests.engine.conftest import REPOSITORY
from tests.engine.test_server import Client, text_of

FRAMES = 6


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("server") / "log"
    model = build_onevision(REPOSITORY / ".models" / "onevision")
    options = ("--plugins", "flashvlm", "--max-model-len", "8192", "--visual-budget", "40")
    with Server(model, options, log=log) as server:
        yield Client(server)


def jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def video_url(*names: str) -> str:
    """Return a video in the form that vLLM accepts without a container: its frames as JPEG."""
    return "data:video/jpeg;base64," + ",".join(
        jpeg(photo(name).resize((100, 90))) for name in names
    )


def gif(frames: int) -> str:
    buffer = io.BytesIO()
    first, *rest = [photo("cat").resize((60, 50)).rotate(10 * number) for number in range(frames)]
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=100)
    return "data:image/gif;base64," + base64.b64encode(buffer.getvalue()).decode()


def message(*parts: tuple[str, str]) -> list[Any]:
    content = [{"type": kind, kind: {"url": url}} for kind, url in parts]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what is it?"}]}]


CLIP = video_url(*["astronaut"] * (FRAMES - 1), "cat")
WHOLE = FRAMES * FRAME_TOKENS + 1


def visual(answer: Any) -> Any:
    return answer.usage.visual_tokens


def test_the_usage_reports_the_tokens_of_a_video(client: Client) -> None:
    whole = client.ask(messages=message(("video_url", CLIP)), visual_budget=None)
    kept = client.ask(messages=message(("video_url", CLIP)), visual_budget=12)
    default = client.ask(messages=message(("video_url", CLIP)))
    for answer, count in ((whole, WHOLE), (kept, 12), (default, 40)):
        assert visual(answer) == {
            "total": WHOLE,
            "kept": count,
            "images": [],
            "videos": [{"total": WHOLE, "kept": count}],
            **({} if count == WHOLE else {"positions": "kept"}),
        }
        assert whole.usage.prompt_tokens - answer.usage.prompt_tokens == WHOLE - count


def test_the_budget_applies_to_an_image_and_a_video_each(client: Client) -> None:
    def kept() -> list[float]:
        name = "flashvlm_visual_tokens_kept_total"
        return [client.metric(f'{name}{{modality="{each}"') for each in ("image", "video")]

    before = kept()
    both = message(("image_url", data_url(photo("coffee"))), ("video_url", CLIP))
    answer = client.ask(messages=both, visual_budget=15)
    assert [item["kept"] for item in visual(answer)["images"]] == [15]
    assert [item["kept"] for item in visual(answer)["videos"]] == [15]
    assert [new - old for new, old in zip(kept(), before, strict=True)] == [15, 15]


def test_a_budget_below_one_token_per_frame_is_refused_with_the_smallest_budget(
    client: Client,
) -> None:
    with pytest.raises(BadRequestError, match=f"the smallest budget for it is {FRAMES}"):
        client.ask(messages=message(("video_url", CLIP)), visual_budget=FRAMES - 1)
    # A fraction is raised to it, and so is the server's default budget.
    fraction = client.ask(messages=message(("video_url", CLIP)), visual_budget=0.001)
    assert visual(fraction)["kept"] == FRAMES
    long = client.ask(messages=message(("video_url", video_url(*["cat", "coffee"] * 24))))
    frames = (visual(long)["total"] - 1) // FRAME_TOKENS
    assert visual(long)["kept"] == max(40, frames)


def test_unusual_pictures_keep_the_exact_count(client: Client) -> None:
    for url in (
        gif(5),  # as an image: its first frame
        data_url(photo("cat").resize((4000, 1))),
        data_url(photo("cat").resize((2, 3))),
    ):
        answer = client.ask(messages=message(("image_url", url)), visual_budget=9)
        assert visual(answer)["images"] == [{"total": visual(answer)["total"], "kept": 9}]
        assert text_of(answer)
