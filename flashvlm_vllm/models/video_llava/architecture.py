# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA without pruning, built from vLLM's modules; vLLM does not include it.

Source of the architecture: Transformers' ``VideoLlavaForConditionalGeneration``. Two CLIP towers
with the same configuration, one for images and one for the frames of videos, share a projector. An
image has one token per patch; each frame of a video has the tower's class token in addition, before
its patches.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VideoLlavaConfig, VideoLlavaProcessor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.llava import (
    BaseLlavaMultiModalProcessor,
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaMultiModalProjector,
    init_vision_tower_for_llava,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.model_executor.models.vision import get_vision_encoder_info
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import VideoEmbeddingItems, VideoProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate


class VideoLlavaProcessingInfo(BaseLlavaProcessingInfo):
    """Token counts of Video-LLaVA. Any number of frames is accepted; the public model was trained
    with 8."""

    def get_hf_config(self) -> Any:
        """Return the configuration."""
        return self.ctx.get_hf_config(VideoLlavaConfig)

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return Transformers' processor."""
        return self.ctx.get_hf_processor(VideoLlavaProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return no limit for images and videos."""
        return {"image": None, "video": None}

    def get_num_frame_tokens(self) -> int:
        """Return the number of tokens of a video frame: its patches and the class token."""
        info = get_vision_encoder_info(self.get_hf_config())
        size = info.get_image_size()
        tokens: int = info.get_num_image_tokens(image_width=size, image_height=size)
        return tokens


class VideoLlavaDummyInputsBuilder(LlavaDummyInputsBuilder[VideoLlavaProcessingInfo]):
    """Builds the largest inputs: videos as long as the context allows."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return the placeholders of the images and videos."""
        video: str = self.info.get_hf_processor().video_token
        return super().get_dummy_text(mm_counts) + video * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        """Return images and videos."""
        size = self.info.get_image_size_with_most_features()
        count = mm_counts.get("video", 0)
        videos = self._get_dummy_videos(
            width=size.width,
            height=size.height,
            num_frames=max(1, seq_len // self.info.get_num_frame_tokens() // max(1, count)),
            num_videos=count,
            overrides=mm_options.get("video"),
        )
        return {**super().get_dummy_mm_data(seq_len, mm_counts, mm_options), "video": videos}


class VideoLlavaMultiModalProcessor(BaseLlavaMultiModalProcessor[VideoLlavaProcessingInfo]):
    """Processes the pixels and placeholders of images and videos."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values_images": MultiModalFieldConfig.batched("image"),
            "image_embeds": MultiModalFieldConfig.batched("image"),
            "pixel_values_videos": MultiModalFieldConfig.batched("video"),
            "video_embeds": MultiModalFieldConfig.batched("video"),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().video_token_index

        def placeholder(number: int) -> list[int]:
            videos = mm_items.get_items("video", (VideoEmbeddingItems, VideoProcessorItems))
            if isinstance(videos, VideoEmbeddingItems):
                return [token] * videos.get_feature_size(number)
            return [token] * (videos.get_num_frames(number) * self.info.get_num_frame_tokens())

        images = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [*images, PromptReplacement("video", [token], placeholder)]


class VideoLlavaForConditionalGeneration(nn.Module, SupportsLoRA, SupportsMultiModal, SupportsPP):
    """Video-LLaVA without pruning. Greedy decoding gives the same tokens as Transformers."""

    packed_modules_mapping = {  # noqa: RUF012  vLLM declares it so
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        # Names in the published checkpoint, and in one saved by Transformers 5.
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.": "",
            "lm_head.": "language_model.lm_head.",
        },
    )
    # For LoRA on towers, vLLM supports models with one tower only.
    supports_tower_connector_lora = False

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the placeholder of an image or a video in a chat."""
        if modality in ("image", "video"):
            return f"<{modality}>"
        raise ValueError("Video-LLaVA supports images and videos only")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Create both towers, the projector and the language model."""
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        if not isinstance(config.vision_feature_layer, int):
            raise ValueError("Video-LLaVA with several vision_feature_layers is not supported")
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                "Video-LLaVA with another vision_feature_select_strategy than default is not "
                "supported"
            )
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size,
            mm_token_ids=[config.image_token_index, config.video_token_index],
        )
        for modality in ("image", "video"):
            name = f"{modality}_tower"
            with self._mark_tower_model(vllm_config, modality):
                tower = init_vision_tower_for_llava(
                    config,
                    quant_config=quant_config,
                    require_post_norm=False,
                    prefix=maybe_prefix(prefix, name),
                )
                setattr(self, name, tower)
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.multi_modal_projector = LlavaMultiModalProjector(
                vision_hidden_size=config.vision_config.hidden_size,
                text_hidden_size=config.text_config.hidden_size,
                projector_hidden_act=config.projector_hidden_act,
                multimodal_projector_bias=config.multimodal_projector_bias,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "multi_modal_projector"),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        language_model: Any = self.language_model
        self.make_empty_intermediate_tensors = language_model.make_empty_intermediate_tensors

    def see(self, pixels: Tensor, modality: str) -> Tensor:
        """Run the vision tower of a modality.

        Args:
            pixels: ``(B, 3, H, W)``, images or frames.
            modality: ``"image"`` or ``"video"``.

        Returns:
            Features: ``(B, N, C)`` of patches for images; ``(B, 1 + N, C)`` for video frames, the
            class token first.

        """
        tower = getattr(self, f"{modality}_tower")
        strategy = "default" if modality == "image" else "full"
        features: Tensor = tower(pixels, feature_select_strategy=strategy)
        return features

    def pixels_of(self, modality: str, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the pixels ``(K, 3, H, W)`` of each item: one image, or a video's frames.

        Raises:
            ValueError: the pixels do not have the tower's input size.

        """
        pixels = list(kwargs[f"pixel_values_{modality}s"])
        side = self.config.vision_config.image_size
        for each in pixels:
            if each.shape[-3:] != (3, side, side):
                raise ValueError(f"{modality}s are 3 x {side} x {side}; got {tuple(each.shape)}")
        return [each[None] if each.dim() == 3 else each for each in pixels]

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Return the embeddings ``(T, D)`` of all tokens of each item."""
        embeddings: list[Tensor] = []
        for modality in ("image", "video"):
            embeddings += list(kwargs.get(f"{modality}_embeds", ()))
            if f"pixel_values_{modality}s" in kwargs:
                items = self.pixels_of(modality, kwargs)
                projected = self.multi_modal_projector(self.see(torch.cat(items), modality))
                embeddings += [
                    each.flatten(0, 1) for each in projected.split([len(item) for item in items])
                ]
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the language model; a later pipeline stage starts from ``intermediate_tensors``."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        language_model: Any = self.language_model
        return language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits of ``hidden_states``."""
        language_model: Any = self.language_model
        logits: Tensor | None = language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the published checkpoint, or one saved by Transformers 5."""
        loader = AutoWeightsLoader(self)
        loaded: set[str] = loader.load_weights(
            _with_tower_names(weights), mapper=self.hf_to_vllm_mapper
        )
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return the module prefixes of language model, projector and towers, for LoRA."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="multi_modal_projector",
            tower_model=["image_tower", "video_tower"],
        )


def _with_tower_names(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Rename tower weights to vLLM's CLIP names; Transformers 5 omits ``vision_model``."""
    for name, weight in weights:
        before, tower, after = name.partition("_tower.")
        if tower and not after.startswith("vision_model."):
            name = f"{before}{tower}vision_model.{after}"
        yield name, weight
