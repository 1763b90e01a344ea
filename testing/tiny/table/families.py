# SPDX-License-Identifier: Apache-2.0
"""The families that have test files of their own, whose checkpoints are written with weights.

Some are not among them: the traces of LLaVA-NeXT and LLaVA-OneVision count the padding of a tile,
too, and the battery reads totals from the trace; LLaVA-NeXT-Video has no images; vLLM itself does
not answer all of the battery's requests to Gemma 3 and Video-LLaVA.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing.tiny import glm4_1v, glm4v, internvl
from testing.tiny.llava import build_llava
from testing.tiny.mistral3 import IMAGE as PIXTRAL_IMAGE
from testing.tiny.mistral3 import build_mistral3
from testing.tiny.qwen3_5 import build_qwen3_5
from testing.tiny.qwen3_vl import build_qwen3_vl
from testing.tiny.qwen_vl import IMAGE, VIDEO, build_qwen_vl
from testing.tiny.table.entry import TinyModel

_VISION = "<|vision_start|>{}<|vision_end|>"
_QWEN: dict[str, Any] = {
    "image": _VISION.format(IMAGE),
    "video": _VISION.format(VIDEO),
    "template": "<|im_start|>user\n{items}{question}<|im_end|>\n<|im_start|>assistant\n",
}
_LLAVA: dict[str, Any] = {"image": "<image>"}


def _entry(
    architecture: str,
    build: Callable[[Path], Path],
    engine: dict[str, Any] | None = None,
    **own: Any,
) -> TinyModel:
    def write(folder: Path) -> None:
        build(folder)

    return TinyModel(architecture, write, engine={"load_format": "auto", **(engine or {})}, **own)


ENTRIES = (
    _entry("LlavaForConditionalGeneration", build_llava, **_LLAVA),
    _entry("Mistral3ForConditionalGeneration", build_mistral3, image=PIXTRAL_IMAGE),
    _entry("GLM4VForCausalLM", glm4v.build_glm4v, image=glm4v.PLACEHOLDER, most_images=1),
    _entry(
        "Glm4vForConditionalGeneration",
        glm4_1v.build_glm4_1v,
        image=glm4_1v.IMAGE,
        video=glm4_1v.VIDEO,
        template="[gMASK]<sop><|user|>\n{items}{question}<|assistant|>\n",
    ),
    _entry(
        "InternVLForConditionalGeneration",
        internvl.build_internvl_hf,
        image=internvl.CONTEXT,
        video=internvl.VIDEO,
    ),
    _entry(
        "InternVLChatModel",
        internvl.build_internvl,
        {"trust_remote_code": True},
        video="<video>",
        **_LLAVA,
    ),
    _entry("Qwen2VLForConditionalGeneration", lambda folder: build_qwen_vl(folder, "2"), **_QWEN),
    _entry(
        "Qwen2_5_VLForConditionalGeneration", lambda folder: build_qwen_vl(folder, "2.5"), **_QWEN
    ),
    _entry("Qwen3VLForConditionalGeneration", build_qwen3_vl, **_QWEN),
    _entry("Qwen3_5ForConditionalGeneration", build_qwen3_5, {"dtype": "bfloat16"}, **_QWEN),
)
