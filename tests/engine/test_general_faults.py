# SPDX-License-Identifier: Apache-2.0
"""An untested model whose encoder gives what the general adapter cannot use.

The request fails with the reason; the engine and other requests go on.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image

from flashvlm_vllm.supported_models import FORCED
from testing.photo import data_url, photo
from testing.server import Server
from tests.engine.test_server import Client, conversation, text_of

pytestmark = pytest.mark.slow

SOURCE = '''
"""Breaks what LLaVA's encoder returns, by the brightness of the darkest image."""

def register():
    from flashvlm_vllm.models.general.model import GeneralModel

    stock = GeneralModel._rows

    def rows(self, kwargs):
        level = int(kwargs["pixel_values"].flatten(1).mean(1).min().add(1.8).mul(4))
        found = stock(self, kwargs)
        if level == 0:
            return [each[:-1] for each in found]
        if level == 1:
            return [each * float("nan") for each in found]
        if level == 2:
            raise RuntimeError("no kernel")
        return found

    GeneralModel._rows = rows
'''
FAULTS = {0: "575 rows for 576 visual tokens", 15: "not finite", 30: "RuntimeError: no kernel"}
"""By the brightness of a grey image, 0 to 255."""


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty_encoder.py").write_text(SOURCE)
    info = folder / "faulty_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty_encoder\nVersion: 1.0\n")
    entry = "[vllm.general_plugins]\nzz_faulty = faulty_encoder:register\n"
    (info / "entry_points.txt").write_text(entry)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_PLUGINS": "flashvlm,zz_faulty",
        # LLaVA has an adapter of its own; with the general one it counts as untested.
        FORCED: "LlavaForConditionalGeneration",
    }
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(clip_llava, log=log, environment=environment) as server:
        yield Client(server)


@pytest.mark.parametrize("grey", FAULTS)
def test_a_faulty_encoder_fails_its_request_only(client: Client, grey: int) -> None:
    def ordinary() -> str:
        return text_of(client.ask("what is it?", visual_budget=9))

    before = ordinary()
    dark = data_url(Image.new("RGB", photo("cat").size, (grey,) * 3))
    asked = {"messages": conversation(url=dark), "question": "what is it?"}
    for _ in range(2):  # the second time from the caches
        with pytest.raises(openai.InternalServerError) as error:
            client.ask(**asked, visual_budget=9)
        assert "visual_budget: the model's encoder" in str(error.value)
        assert FAULTS[grey] in str(error.value)
    assert text_of(client.ask(**asked))
    assert ordinary() == before


@pytest.mark.parametrize("grey", FAULTS)
def test_another_image_of_the_same_batch_is_not_affected(client: Client, grey: int) -> None:
    dark = data_url(Image.new("RGB", (90, 60), (grey,) * 3))
    bright = data_url(photo("coffee").rotate(grey))
    question = {"type": "text", "text": "what is it?"}
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in (bright, dark)]
    both = [{"role": "user", "content": [*parts, question]}]
    with pytest.raises(openai.InternalServerError, match="the model's encoder failed"):
        client.ask(messages=both, visual_budget=9)
    # Its features and its selection are in the caches now.
    assert text_of(client.ask(messages=conversation(url=bright), visual_budget=9))
