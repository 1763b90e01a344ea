# SPDX-License-Identifier: Apache-2.0
"""An entry of the table: how a tiny model is written, and how its prompts look."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class TinyModel:
    """A tiny model of one architecture."""

    architecture: str
    """As in vLLM's registry."""
    write: Callable[[Path], None]
    """Writes configuration, tokenizer and processor into a folder, no weights."""
    image: str
    """Text of one image in a prompt."""
    video: str | None = None
    """Text of one video in a prompt, or of a chunk; ``None`` if vLLM's model has no videos."""
    audio: str | None = None
    """Text of one audio clip in a prompt; ``None`` if the entry has none."""
    template: str = "USER: {items}\n{question} ASSISTANT:"
    """A prompt with its images or videos and a question."""
    size: tuple[int, int] = (224, 168)
    """Width and height of an image in the tests, in pixels."""
    most_images: int | None = None
    """Most images of a prompt; ``None`` if vLLM has no limit."""
    chunks: bool = False
    """Whether vLLM takes images and parts of videos as one kind, vision chunks."""
    tokens: Callable[[str, Sequence[Image.Image]], list[int]] | None = None
    """Returns the token ids of a prompt with a question about images; ``None`` if vLLM makes them
    of the prompt's text."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``vllm.LLM`` in addition to those of all models."""
    prepare: Callable[[], None] = lambda: None
    """Called before an engine is made in this process."""

    def data(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return the images of a prompt as vLLM takes them."""
        if not self.chunks:
            return {"image": list(images)}
        return {"vision_chunk": [{"type": "image", "image": image} for image in images]}

    def request(self, question: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return a prompt with a question about images, as ``LLM.generate`` takes it."""
        data = {"multi_modal_data": self.data(images)}
        if self.tokens is not None:
            return {"prompt_token_ids": self.tokens(question, images), **data}
        return {"prompt": self.prompt(question, images=len(images)), **data}

    def clip(self, frames: Sequence[Image.Image], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return a video of a prompt as vLLM takes it: with metadata, or as one vision chunk."""
        if not self.chunks:
            return {"video": [(np.stack([np.asarray(each) for each in frames]), metadata)]}
        return {"vision_chunk": [{"type": "video_chunk", "video_chunk": list(frames)}]}

    def prompt(self, question: str, images: int = 1, videos: int = 0, clips: int = 0) -> str:
        """Return a prompt with a question about so many images, videos and audio clips."""
        items = self.image * images + (self.video or "") * videos + (self.audio or "") * clips
        return self.template.format(items=items, question=question)
