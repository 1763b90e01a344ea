# SPDX-License-Identifier: Apache-2.0
"""Time from an image to the first token: through a server, and on Transformers' model."""

import time
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image
from transformers import AutoProcessor

from benchmarks.accuracy.inside.fastv import fastv
from benchmarks.efficiency.figures import Way
from benchmarks.efficiency.formulas import FASTV_LAYER
from benchmarks.efficiency.paper import UNPRUNED
from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.servers import MODEL_NAME
from small_vlm.checkpoint import IMAGE
from testing.photo import data_url

QUESTION: Final = "What is in this picture?"
PROMPT: Final = f"USER: <image>\n{QUESTION} ASSISTANT:"
WORD: Final = " picture"
"""The only answer allowed: the output of random weights may not be text."""


@dataclass(frozen=True)
class First:
    """A first token."""

    seconds: float
    visual_tokens: int


class Served:
    """Stock vLLM for the unpruned model, the plugin for the others."""

    def __init__(self, stock: str, plugin: str, tokenizer: Any) -> None:
        self._stock = stock
        self._plugin = plugin
        (self._word,) = tokenizer.encode(WORD, add_special_tokens=False)
        text = PROMPT.replace("<image>", "")
        self._words = len(tokenizer(text, add_special_tokens=False).input_ids)

    def first(self, way: Way, image: Image.Image) -> First:
        """Send a request for one token."""
        fields: dict[str, Any] = {"allowed_token_ids": [self._word]}
        if way.method != UNPRUNED:
            fields |= {"visual_budget": way.budget, "visual_selector": way.method}
        url = self._stock if way.method == UNPRUNED else self._plugin
        reply = ask(url, MODEL_NAME, [user(QUESTION, data_url(image))], tokens=1, **fields)
        return First(reply.ttft, reply.visual_tokens or reply.prompt_tokens - self._words)


class OnTransformers:
    """The same checkpoint without an engine; FastV cuts between two layers of it."""

    def __init__(self, model: Any, processor_folder: Any) -> None:
        self._model = model.eval()
        self._processor = AutoProcessor.from_pretrained(processor_folder)

    @torch.inference_mode()
    def first(self, image: Image.Image, budget: int | None, *, own_forward: bool) -> First:
        """Compute one token; ``None`` keeps everything, by the same code unless ``own_forward``."""
        started = time.perf_counter()
        model = self._model
        inputs = self._processor(text=PROMPT, images=image, return_tensors="pt").to(model.device)
        pixels = inputs["pixel_values"].to(model.dtype)
        seen = model.model.get_image_features(pixels, image_sizes=inputs["image_sizes"])
        patches = seen.pooler_output[0]
        ids = inputs["input_ids"][0]
        places = (ids == IMAGE).nonzero()[:, 0]
        embeddings = model.get_input_embeddings()(ids)
        embeddings[places] = patches.to(embeddings.dtype)
        if own_forward:
            out = model.model.language_model(inputs_embeds=embeddings[None], use_cache=False)
            logits = model.lm_head(out.last_hidden_state[0, -1])
        else:
            visual = slice(int(places[0]), int(places[-1]) + 1)
            logits = fastv(model, embeddings, visual, budget or len(places), FASTV_LAYER)
        int(logits.argmax())  # waits for the device, if there is one
        return First(time.perf_counter() - started, budget or len(places))
