# SPDX-License-Identifier: Apache-2.0
"""What an image or a video will cost, from its size alone: no weights, no pixels, no server."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flashvlm_vllm.ipc.gaps import allowed_gap
from flashvlm_vllm.plugin import activate
from flashvlm_vllm.request.budget import ItemCount, parse_budget
from flashvlm_vllm.supported_models import MODELS, covers


class PromptCost(NamedTuple):
    """What a prompt takes of a context, and of the model's positions."""

    tokens: int
    """KV cache is held for."""
    dropped: int
    """Visual tokens that are not kept."""
    free: int
    """Positions that stay free for them; fewer where the prompt is long (`gaps`), none where places
    close up. With M-RoPE positions do not count tokens, and this is 0."""
    answer: int
    """The longest answer."""


class TokenCosts:
    """Counts of one model, by the same code that shortens the placeholders of its requests.

    For routers and clients that must know how long a prompt becomes; see also the command
    ``flashvlm tokens``.
    """

    def __init__(self, model: str, **engine_arguments: Any) -> None:
        """Read a model's configuration and processor.

        Args:
            model: a name or a folder, as ``vllm serve`` takes it.
            engine_arguments: those that change the processor, as ``vllm.LLM`` takes them
                (``trust_remote_code``, ``revision``, ``mm_processor_kwargs``).

        Raises:
            ValueError: the model is not covered; the message lists those that are.

        """
        from vllm.engine.arg_utils import EngineArgs
        from vllm.multimodal import MULTIMODAL_REGISTRY

        activate()
        config = EngineArgs(model=model, **engine_arguments).create_model_config()
        if not covers(config):
            raise ValueError(
                f"{model} is {config.architecture}; covered are {', '.join(sorted(MODELS))}"
            )
        self._config = config
        self._processor: Any = MULTIMODAL_REGISTRY.create_processor(config)

    def of_image(self, width: int, height: int, budget: object = None) -> ItemCount:
        """Count the visual tokens of an image of ``width`` x ``height`` pixels.

        Args:
            width: in pixels.
            height: in pixels.
            budget: as in a request; ``None``: no pruning.

        Raises:
            ValueError: the budget is none, or too small for the item.

        """
        return _cost(self._processor.count_image_tokens(width, height), budget, "image")

    def of_video(
        self, frames: int, width: int, height: int, budget: object = None, fps: float = 2.0
    ) -> ItemCount:
        """Count the visual tokens of a video.

        Args:
            frames: as many as vLLM samples of it (``--media-io-kwargs``), not as the file has.
            width: of a frame, in pixels.
            height: of a frame, in pixels.
            budget: as in a request; ``None``: no pruning.
            fps: sampled frames per second; some families write the time between frames.

        Raises:
            NotImplementedError: the model's videos are not pruned.
            ValueError: the budget is none, or smaller than the number of time steps.

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
        """Lay out a prompt whose kept tokens keep their places.

        Args:
            items: its images and videos.
            text: its other tokens.
            answer: tokens that the request allows to be generated; ``None``: what is left.

        Raises:
            ValueError: the prompt is longer than the context.

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
