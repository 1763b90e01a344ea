# SPDX-License-Identifier: Apache-2.0
"""Counts the visual tokens of images and videos from their sizes, without weights or a server."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flashvlm_vllm.ipc.gaps import allowed_gap
from flashvlm_vllm.plugin import activate
from flashvlm_vllm.request.budget import ItemCount, parse_budget
from flashvlm_vllm.supported_models import covers, why_not_covered


class PromptCost(NamedTuple):
    """Number of tokens and positions of a prompt."""

    tokens: int
    """Tokens of the prompt that need KV cache."""
    dropped: int
    """Visual tokens that are dropped."""
    free: int
    """Positions left unused for dropped tokens. Fewer than ``dropped`` if the prompt is long (see
    `ipc.gaps`); 0 if positions are consecutive. With M-RoPE positions do not count tokens, and this
    is 0."""
    answer: int
    """Most tokens that can be generated."""


class TokenCosts:
    """Token counts of one model, by the code that shortens the placeholders of its requests.

    For routers and clients that need the length of a prompt; see also the command
    ``flashvlm tokens``.
    """

    def __init__(self, model: str, **engine_arguments: Any) -> None:
        """Read a model's configuration and processor.

        Args:
            model: a model name or a local path, as for ``vllm serve``.
            engine_arguments: engine arguments that affect the processor, as for ``vllm.LLM``
                (``trust_remote_code``, ``revision``, ``mm_processor_kwargs``).

        Raises:
            ValueError: the model is not covered; the message says why.

        """
        from vllm.engine.arg_utils import EngineArgs
        from vllm.multimodal import MULTIMODAL_REGISTRY

        activate()
        config = EngineArgs(model=model, **engine_arguments).create_model_config()
        if not covers(config):
            raise ValueError(f"{model} is not covered: {why_not_covered(config)}")
        self._config = config
        self._processor: Any = MULTIMODAL_REGISTRY.create_processor(config)

    def of_image(self, width: int, height: int, budget: object = None) -> ItemCount:
        """Count the visual tokens of an image of ``width`` x ``height`` pixels.

        Args:
            width: in pixels.
            height: in pixels.
            budget: as in a request; ``None``: no pruning.

        Raises:
            ValueError: the budget is not valid, or too small for the image.

        """
        return _cost(self._processor.count_image_tokens(width, height), budget, "image")

    def of_video(
        self, frames: int, width: int, height: int, budget: object = None, fps: float = 2.0
    ) -> ItemCount:
        """Count the visual tokens of a video.

        Args:
            frames: number of frames that vLLM samples (``--media-io-kwargs``), not that of the
                file.
            width: of a frame, in pixels.
            height: of a frame, in pixels.
            budget: as in a request; ``None``: no pruning.
            fps: sampled frames per second; some model families add timestamps to the prompt.

        Raises:
            NotImplementedError: videos of this model are not pruned.
            ValueError: the budget is not valid, or smaller than the number of time steps.

        """
        metadata = {
            "fps": fps,
            "duration": frames / fps,
            "total_num_frames": frames,
            "frames_indices": list(range(frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        count = self._processor.count_video_tokens(frames, width, height, metadata)
        return _cost(count, budget, "video")

    def of_prompt(
        self, items: Sequence[ItemCount], text: int = 0, answer: int | None = None
    ) -> PromptCost:
        """Return the costs of a prompt whose kept tokens keep their positions.

        Args:
            items: counts of the prompt's images and videos.
            text: number of its other tokens.
            answer: most tokens to generate (``max_tokens``); ``None``: what the context leaves.

        Raises:
            ValueError: the prompt is longer than ``max_model_len``.

        """
        from flashvlm_vllm.position_scheme import axes_of, table_length

        tokens = text + sum(item.kept for item in items)
        dropped = sum(item.total - item.kept for item in items)
        context = self._config.max_model_len
        if tokens >= context:
            raise ValueError(f"{tokens} tokens do not fit into a context of {context}")
        longest = context - tokens if answer is None else min(answer, context - tokens)
        gap = dropped if axes_of(self._config) == 1 else 0
        fit = allowed_gap(tokens, gap, longest, context, table_length(self._config))
        return PromptCost(tokens, dropped, fit.gap, fit.answer)


def _cost(count: Any, budget: object, modality: str) -> ItemCount:
    checked = parse_budget(budget)
    if isinstance(checked, int) and checked < count.floor:
        raise ValueError(f"{checked} tokens are too few; the smallest budget is {count.floor}")
    return ItemCount(count.total, count.kept(checked), modality)
