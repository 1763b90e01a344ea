# SPDX-License-Identifier: Apache-2.0
"""Models with a SigLIP tower: LFM2-VL, Command A Vision, Aria, PaliGemma, Granite 4 Vision.

PaliGemma has no text for an image: vLLM writes its tokens before the prompt, and takes one image.
"""

from pathlib import Path
from typing import Any, Final

from transformers import (
    AriaConfig,
    AriaImageProcessor,
    AriaProcessor,
    Cohere2VisionConfig,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    Granite4VisionConfig,
    Granite4VisionProcessor,
    Lfm2VlConfig,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlavaNextImageProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import TOWER, save, text
from testing.tiny.words import HIDDEN, token_id, tokenizer_with

SIDE: Final = 112
PATCH: Final = 14
GRID: Final = SIDE // PATCH
SIGLIP: Final[dict[str, Any]] = {
    **TOWER,
    "model_type": "siglip_vision_model",
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}
SQUARE: Final = {"height": SIDE, "width": SIDE}
ARIA_SIDE: Final = 490
"""Of the two sizes that Aria's image processor allows, the smaller."""
ARIA_TOKENS: Final = 16


def _lfm2(folder: Path) -> None:
    marks = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    for row in range(1, 3):
        for column in range(1, 3):
            marks[f"tile_{row}_{column}"] = f"<|img_row_{row}_col_{column}|>"
    tokenizer = tokenizer_with(marks)
    processor = Lfm2VlProcessor(
        Lfm2VlImageProcessor(
            encoder_patch_size=16,
            tile_size=128,
            min_image_tokens=4,
            max_image_tokens=16,
            max_tiles=4,
        ),
        tokenizer,
    )
    config = Lfm2VlConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip2_vision_model",
            "patch_size": 16,
            "num_patches": 64,
            "vision_use_head": False,
        },
        text_config=text(
            tokenizer,
            model_type="lfm2",
            layer_types=["conv", "full_attention"],
            conv_L_cache=3,
            block_dim=HIDDEN,
            conv_dim=HIDDEN,
            conv_dim_out=HIDDEN,
        ),
        image_token_id=token_id(tokenizer, "<image>"),
        projector_hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )
    save(folder, "Lfm2VlForConditionalGeneration", config, processor)


def _cohere2(folder: Path) -> None:
    tokenizer = tokenizer_with(
        {
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        }
    )
    processor = Cohere2VisionProcessor(
        # The processor takes the patch size for the tokens along a side of a tile.
        Cohere2VisionImageProcessor(size=SQUARE, patch_size=GRID // 2, max_patches=4),
        tokenizer,
    )
    config = Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=text(
            tokenizer,
            model_type="cohere2",
            logit_scale=1.0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        image_token_id=token_id(tokenizer, "<|IMG_PATCH|>"),
        alignment_intermediate_size=2 * HIDDEN,
    )
    save(folder, "Cohere2VisionForConditionalGeneration", config, processor)


def _aria(folder: Path) -> None:
    tokenizer: Any = tokenizer_with({"image_token": "<|img|>"})
    processor = AriaProcessor(
        AriaImageProcessor(max_image_size=ARIA_SIDE),
        tokenizer,
        size_conversion={ARIA_SIDE: ARIA_TOKENS},
    )
    config = AriaConfig(
        vision_config={
            **TOWER,
            "model_type": "idefics3_vision",
            "image_size": ARIA_SIDE,
            "patch_size": PATCH,
        },
        text_config=text(
            tokenizer,
            model_type="aria_text",
            moe_num_experts=4,
            moe_topk=2,
            moe_num_shared_experts=2,
        ),
        projector_patch_to_query_dict={(ARIA_SIDE // PATCH) ** 2: ARIA_TOKENS},
        image_token_index=token_id(tokenizer, "<|img|>"),
    )
    save(folder, "AriaForConditionalGeneration", config, processor)


def _paligemma(folder: Path) -> None:
    tokenizer = tokenizer_with({"image_token": "<image>"})
    tokenizer.add_tokens(["\n"])
    images: Any = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = GRID**2
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": HIDDEN},
        text_config=text(tokenizer, model_type="gemma2", head_dim=32, query_pre_attn_scalar=32),
        image_token_index=token_id(tokenizer, "<image>"),
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )
    save(folder, "PaliGemmaForConditionalGeneration", config, processor)


def _granite4(folder: Path) -> None:
    tokenizer = tokenizer_with({"image_token": "<image>"})
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = Granite4VisionProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=grids
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
    )
    config = Granite4VisionConfig(
        vision_config=SIGLIP,
        text_config=text(tokenizer, num_hidden_layers=4),
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=grids,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_target_layers=[2, 3],
    )
    save(folder, "Granite4VisionForConditionalGeneration", config, processor)


ENTRIES: Final = (
    TinyModel("Lfm2VlForConditionalGeneration", _lfm2, image="<image>"),
    TinyModel("Cohere2VisionForConditionalGeneration", _cohere2, image="<|IMG_PATCH|>"),
    TinyModel(
        "AriaForConditionalGeneration",
        _aria,
        image="<|img|>",
        # Aria's processor has the larger size among its own defaults.
        engine={"mm_processor_kwargs": {"max_image_size": ARIA_SIDE}},
    ),
    TinyModel("PaliGemmaForConditionalGeneration", _paligemma, image="", most_images=1),
    TinyModel("Granite4VisionForConditionalGeneration", _granite4, image="<image>"),
)
