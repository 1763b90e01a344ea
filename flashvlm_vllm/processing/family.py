# SPDX-License-Identifier: Apache-2.0
"""Hooks in which the processors of model families differ: counts, placeholders, item parts."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
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
"""Fields of placeholder token ids in the configurations of model families."""


class FamilyHooks:
    """Hooks of a model family's processor.

    A family overrides `count_image_tokens` if its images differ in their number of tokens, and
    `count_video_tokens` if it has videos. The other hooks have defaults.
    """

    info: Any
    """vLLM's processing info for the model."""

    placeholder_texts: ClassVar[tuple[str, ...]] = ()
    """Placeholder texts of images and videos in a prompt that are not special tokens."""
    counts_whole_items: ClassVar[bool] = True
    """Whether items are counted before they are processed, even if nothing is pruned."""

    def count_item(
        self, items: Any, number: int, modality: str, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount | None:
        """Count an image's or a video's visual tokens; ``None`` if its pixels are not there.

        Args:
            items: items of one modality, as vLLM passes them to the processor.
            number: number of the item.
            modality: modality of the items.
            arguments: the request's Hugging Face processor arguments.

        """
        item = items.get(number)
        if item is None:
            return None
        if modality == "image":
            size = items.get_image_size(number)
            return self.count_image_tokens(size.width, size.height, arguments)
        frames, metadata = item if isinstance(item, tuple) else (item, None)
        # From the frames alone: vLLM's items cannot return the frame size of a video with metadata.
        size = VideoProcessorItems([frames]).get_frame_size(0)
        return self.count_video_tokens(len(frames), size.width, size.height, metadata, arguments)

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the visual tokens of an unpruned image.

        Args:
            width: in pixels.
            height: in pixels.
            arguments: the request's Hugging Face processor arguments, which may change counts.

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
            frames: number of frames, after vLLM's sampling.
            width: of a frame, in pixels.
            height: of a frame, in pixels.
            metadata: metadata of the video from vLLM's loader, if the model uses it.
            arguments: the request's Hugging Face processor arguments, which may change counts.

        Raises:
            NotImplementedError: the family does not prune videos.

        """
        raise NotImplementedError(f"{type(self).__name__} does not prune videos")

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the regions of the image that an item's parts cover, by their part number.

        Args:
            modality: modality of the item.
            width: of the image or a frame, in pixels.
            height: of the image or a frame, in pixels.
            arguments: the request's Hugging Face processor arguments.

        Returns:
            The parts whose region is known; by default one grid over the whole image.

        """
        return {0: Placed(WHOLE)}

    def shorten_placeholder(self, whole: PromptUpdateInfo, count: TokenCount, keep: int) -> Any:
        """Return an item's placeholder with as many embeddings as tokens are kept.

        Arguments and errors are those of `placeholders.first_embeddings`, which is the default.
        """
        return first_embeddings(whole, count, keep)

    def placeholder_ids(self) -> list[int]:
        """Return the token ids that mark images and videos in a prompt and are not words."""
        config = self.info.get_hf_config()
        ids = [getattr(config, name, None) for name in _PLACEHOLDER_IDS]
        return [each for each in ids if isinstance(each, int)]

    def own_request(self, request: VisualRequest, items: MultiModalDataItems) -> VisualRequest:
        """Return the settings that apply to this family; by default the request's.

        Raises:
            Refusal: the family does not support what the request asks for.

        """
        return request

    def own_inputs(
        self, items: Any, modality: str, arguments: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, Any]:
        """Return additional model inputs of pruned items; by default none.

        Args:
            items: items of one modality, as vLLM passes them to the processor.
            modality: modality of the items.
            arguments: the request's Hugging Face processor arguments.
            names: identities of the items by their pixels.

        """
        return {}

    def own_fields(self, inputs: Mapping[str, Any]) -> dict[str, MultiModalFieldConfig]:
        """Return the field configurations of the additional inputs that are present."""
        return {}
