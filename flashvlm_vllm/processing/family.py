# SPDX-License-Identifier: Apache-2.0
"""What differs between the processors of model families: counts, placeholders, parts of an item."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing.processor import PromptUpdateInfo

from flashvlm_vllm.ipc.explain_request import WHOLE, Placed
from flashvlm_vllm.processing.placeholders import first_embeddings
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.request.read_request import VisualRequest

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})

_PLACEHOLDER_IDS = (
    "image_token_index",
    "image_token_id",
    "video_token_index",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
"""Names of placeholder ids in the configurations of model families."""


class FamilyHooks:
    """Hooks of a family's processor.

    Every family with images that do not all have the same number of tokens overrides
    `count_image_tokens`, every family with videos `count_video_tokens`; the others have defaults.
    """

    info: Any
    """vLLM's processing info of the model."""

    placeholder_texts: ClassVar[tuple[str, ...]] = ()
    """Text that stands for an image or a video in a prompt without being a special token."""
    prunes_videos: ClassVar[bool] = True
    """Whether a budget applies to videos, where the model takes any."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the visual tokens of an unpruned image.

        Args:
            width: in pixels.
            height: in pixels.
            arguments: the request's, of the Hugging Face processor; they may change counts.

        """
        total = self.info.get_num_image_tokens(image_width=width, image_height=height)
        return TokenCount(total, total)

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count the visual tokens of an unpruned video; the floor is one token per time step.

        Args:
            frames: of the video as vLLM passes it to the processor, sampled already.
            width: of a frame, in pixels.
            height: of a frame, in pixels.
            metadata: of the video from vLLM's loader, where the model asks for it.
            arguments: the request's, of the Hugging Face processor; they may change counts.

        """
        raise NotImplementedError(f"{type(self).__name__} does not prune videos")

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return where in the picture an item's parts lie, by their number in the worker.

        Args:
            modality: of the item.
            width: of the image or a frame, in pixels.
            height: likewise.
            arguments: the request's, of the Hugging Face processor.

        Returns:
            the parts whose place is known; by default one grid over the whole picture.

        """
        return {0: Placed(WHOLE)}

    def shorten_placeholder(self, whole: PromptUpdateInfo, count: TokenCount, keep: int) -> Any:
        """Return an item's placeholder with as many embeddings as tokens are kept.

        Args and errors as of `placeholders.first_embeddings`, which is the default.
        """
        return first_embeddings(whole, count, keep)

    def placeholder_ids(self) -> list[int]:
        """Return the ids that mark images and videos in a prompt and are not words."""
        config = self.info.get_hf_config()
        ids = [getattr(config, name, None) for name in _PLACEHOLDER_IDS]
        return [each for each in ids if isinstance(each, int)]

    def own_request(self, request: VisualRequest, items: MultiModalDataItems) -> VisualRequest:
        """Return what applies of a request to this family; by default all of it.

        Raises:
            Refusal: the family cannot do what is asked.

        """
        return request

    def own_inputs(self, items: Any, modality: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return further model inputs of planned items; by default none.

        Args:
            items: of one modality, as vLLM passes them to the processor.
            modality: of the items.
            arguments: the request's, of the Hugging Face processor.

        """
        return {}

    def own_fields(self, inputs: Mapping[str, Any]) -> dict[str, MultiModalFieldConfig]:
        """Return vLLM's descriptions of those inputs, as far as they are there."""
        return {}
