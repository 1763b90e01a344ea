# SPDX-License-Identifier: Apache-2.0
"""Small LLaVA checkpoints, built locally: nothing is downloaded and nothing was trained.

They have the structure of LLaVA-1.5 (CLIP or SigLIP tower at 336 px and patch 14, hence 576 visual
tokens; MLP projector; Llama) and load in vLLM and in Transformers. Their weights are random, so
their output has no meaning. It depends on every pixel and on the question and never ends before
``max_tokens``: this is what tests and benchmarks of the code around the model need. The demo uses
the trained model of ``small_vlm``.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from small_vlm import checkpoint
from small_vlm.checkpoint import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    HEAD_DIM,
    IMAGE,
    PAD,
    PIXEL_MEAN,
    PIXEL_STD,
    SPECIAL_TOKENS,
    rename_tower,
)

Tower = Literal["clip", "siglip"]

IMAGE_SIZE = 336
PATCH_SIZE = 14
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

# The tilings of llava-v1.6: one row of two, a square of four, one row of three, and so on.
GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# The size of a layer's outputs for inputs of size one; 1 where not listed. Found by trying: with
# less the model repeats one word whatever the image, with more rounding would choose the words.
VISION_GAINS = {"q_proj": 1.7, "k_proj": 1.7}
TEXT_GAINS = {"q_proj": 3.0, "k_proj": 3.0, "down_proj": 2.0, "linear_2": 1.5, "lm_head": 3.0}

# What the tokenizer is trained on, and so the words that the models can say.
SENTENCES = (
    "USER: What is in this picture? ASSISTANT: A small brown dog sleeps on the old red chair.",
    "You are a careful assistant who looks at photographs and answers questions about them.",
    "How many people stand near the white house, and what are they holding in their hands?",
    "The woman in an orange suit smiles in front of a flag and a model of the space shuttle.",
    "A cat with green eyes lies on a soft blanket and watches something outside the window.",
    "There is a cup of hot coffee with a spoon on a wooden table next to a blue plate.",
    "The rocket rises above the tower into dark clouds while bright smoke covers the ground.",
    "Which colour is the car on the left of the tree? It is yellow with a black roof.",
    "Describe the image in one short sentence. Name every animal that you can see in it.",
    "Behind the bridge a river runs through the valley between tall mountains and green fields.",
    "Is the man with the hat reading a book or writing a letter? Where is his bicycle?",
    "Two children play with a round ball on the sandy beach under a clear summer sky.",
    "The sign above the door says open, but the street is empty and the lights are off.",
    "Fresh bread, three apples, a knife and a bottle of water are left on the kitchen shelf.",
    "What is left of the dog? What is right of the cat? What does the text on the page say?",
    "The galaxy looks like a spiral of stars far away from the moon and from our planet.",
)


def build_llava(
    path: str | os.PathLike[str],
    *,
    tower: Tower = "clip",
    next: bool = False,
    hidden: int = 128,
    layers: int = 4,
    vision_hidden: int = 128,
    vision_layers: int = 4,
    vocab: int = 1024,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write a LLaVA-1.5-shaped checkpoint (LLaVA-NeXT with ``next``) and return its folder.

    ``hidden`` and ``vision_hidden`` are multiples of 32, the size of a head. ``vocab`` is an upper
    bound. A folder that already holds the same model is left as it is.
    """
    asked = {name: value for name, value in locals().items() if name != "path"}
    for name in ("hidden", "vision_hidden"):
        if asked[name] % HEAD_DIM:
            raise ValueError(f"{name} must be a multiple of {HEAD_DIM}, got {asked[name]}")

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(vocab)
        vision: dict[str, Any] = {
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_hidden // HEAD_DIM,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        }
        strategy = "default" if tower == "clip" else "full"  # SigLIP has no CLS token to drop.
        if tower == "clip":
            vision["projection_dim"] = vision_hidden
        else:
            vision["vision_use_head"] = False
        vision_config = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
        settings: dict[str, Any] = {
            "vision_config": vision_config(**vision),
            "text_config": text_config(tokenizer, hidden, layers, 8192 if next else 4096),
            "image_token_index": IMAGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": strategy,
        }
        model: PreTrainedModel
        if next:
            config = LlavaNextConfig(**settings, image_grid_pinpoints=GRID_PINPOINTS)
            model = LlavaNextForConditionalGeneration(config)
        else:
            model = LlavaForConditionalGeneration(LlavaConfig(**settings))
        save(model, tokenizer, folder, seed, dtype)
        processor = (LlavaNextProcessor if next else LlavaProcessor)(
            image_processor=image_processor(tower, next),
            tokenizer=tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1 if tower == "clip" else 0,
            chat_template=CHAT_TEMPLATE,
        )
        processor.save_pretrained(folder)

    return build_once(Path(path), {"kind": "llava", **asked}, write)


def build_text_llama(
    path: str | os.PathLike[str],
    *,
    hidden: int = 128,
    layers: int = 2,
    vocab: int = 1024,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write a text-only Llama with the same tokenizer, a model that the plugin does not cover."""
    asked = {name: value for name, value in locals().items() if name != "path"}

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(vocab)
        model = LlamaForCausalLM(text_config(tokenizer, hidden, layers, 4096))
        save(model, tokenizer, folder, seed, dtype)
        tokenizer.save_pretrained(folder)

    return build_once(Path(path), {"kind": "text-llama", **asked}, write)


def build_once(path: Path, asked: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Fill ``path`` through ``write(folder)`` unless it already contains that model."""
    # The code of this package counts as a parameter: when it changes, models are built again.
    files = [*sorted(Path(__file__).parent.rglob("*.py")), Path(checkpoint.__file__)]
    source = b"".join(file.read_bytes() for file in files)
    asked = asked | {"source": hashlib.sha256(source).hexdigest()}
    note = path / "built.json"
    if note.is_file() and json.loads(note.read_text()) == asked:
        return path
    if path.exists() and any(path.iterdir()) and not note.is_file():
        raise FileExistsError(f"{path} contains something that was not built here")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built in a neighbouring folder and renamed: an interrupted build leaves no partial model.
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(folder)
        (folder / note.name).write_text(json.dumps(asked, indent=2) + "\n")
        folder.chmod(0o755)
        shutil.rmtree(path, ignore_errors=True)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def train_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of ``SENTENCES`` is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    # As in Llama: <s> before a plain prompt, but not before the text of a chat template.
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def text_config(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, positions: int
) -> LlamaConfig:
    """Return the configuration of a Llama with this tokenizer's vocabulary."""
    heads = hidden // HEAD_DIM
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def image_processor(tower: Tower, next: bool) -> CLIPImageProcessor | LlavaNextImageProcessor:
    """Return the image processor of LLaVA-1.5, or of LLaVA-NeXT with ``next``."""
    settings: dict[str, Any] = {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": PIXEL_MEAN[tower],
        "image_std": PIXEL_STD[tower],
    }
    if next:
        return LlavaNextImageProcessor(**settings, image_grid_pinpoints=GRID_PINPOINTS)
    return CLIPImageProcessor(**settings)


def save(
    model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, dtype: str
) -> None:
    """Draw weights and write the model, with the tower's weights named as in public checkpoints."""
    draw_weights(model, tokenizer, seed)
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    rename_tower(folder / "model.safetensors")


@torch.no_grad()
def draw_weights(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Draw weights for which attention is selective and the best word leads clearly.

    With the usual standard deviation of 0.02 every attention map is flat and all logits are nearly
    equal: the image would have no effect, and rounding would decide between words. Generation
    ends at ``</s>`` and starts with ``<s>``.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        layer, kind = name.split(".")[-2:] if "." in name else ("", name)
        if kind in ("class_embedding", "image_newline"):
            weight.normal_(generator=generator)
        elif kind == "bias":
            weight.zero_()
        elif weight.ndim == 1:  # the scale of a norm
            weight.fill_(1.0)
        elif "embed_tokens" in name:
            weight.normal_(generator=generator)
        elif "position_embedding" in name:
            weight.normal_(std=0.5, generator=generator)
        else:
            gains = VISION_GAINS if "vision_tower" in name else TEXT_GAINS
            fan_in = weight[0].numel()
            weight.normal_(std=gains.get(layer, 1.0) * fan_in**-0.5, generator=generator)
    # Only whole words can win (their logits are far above zero): readable text that never ends
    # early and contains no special token and no half of a character.
    words = {f" {word}" for word in re.findall(r"\b[a-z]+\b", " ".join(SENTENCES))}
    is_word = torch.tensor([tokenizer.decode([token]) in words for token in range(len(tokenizer))])
    model.get_output_embeddings().weight[~is_word] = 0.0
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
