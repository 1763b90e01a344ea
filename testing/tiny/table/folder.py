# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint: its configuration, its processor, and code that only a checkpoint has."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from testing.tiny.table.parts import write_json
from testing.tiny.words import tokenizer_with

HIDDEN = 64
HEADS = 2
LAYERS = 2

_CONFIGURATION = """\
{imports}

class {name}({base}):
    model_type = "{model_type}"

    def __init__(self, {arguments}**kwargs):
{body}        super().__init__(**kwargs)
"""


def write_config(folder: Path, architecture: str, config: Mapping[str, Any]) -> None:
    """Write ``config.json``, for weights in float32."""
    write_json(
        folder / "config.json",
        {"architectures": [architecture], "torch_dtype": "float32", **config},
    )


def write_configuration(
    folder: Path,
    model_type: str,
    parts: Mapping[str, str],
    *,
    name: str = "Configuration",
    base: str = "PretrainedConfig",
) -> dict[str, Any]:
    """Write a class for a configuration that Transformers has no class for.

    Args:
        folder: of the checkpoint.
        model_type: of the configuration.
        parts: classes of its parts, by field: ``{"text_config": "Qwen2Config"}``; of Transformers,
            if no module stands before the class.
        name: of the class.
        base: class that it extends.

    Returns:
        the fields of ``config.json`` that name the class.

    """
    classes = {kind: kind.rpartition(".") for kind in sorted({base, *parts.values()})}
    body = "".join(
        f"        self.{part} = {classes[kind][2]}(**({part} or {{}}))\n"
        for part, kind in parts.items()
    )
    code = _CONFIGURATION.format(
        imports="".join(
            f"from {module or 'transformers'} import {kind}\n"
            for module, _dot, kind in classes.values()
        ),
        name=name,
        base=base,
        model_type=model_type,
        arguments="".join(f"{part}=None, " for part in parts),
        body=body,
    )
    (folder / "configuration.py").write_text(code)
    return {"model_type": model_type, "auto_map": {"AutoConfig": f"configuration.{name}"}}


def text_fields(tokenizer: PreTrainedTokenizerFast, **own: Any) -> dict[str, Any]:
    """Return the fields that the configurations of most language models have."""
    return {
        "vocab_size": vocabulary(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **own,
    }


def vision_fields(**own: Any) -> dict[str, Any]:
    """Return the fields that the configurations of most towers have."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        **own,
    }


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the size of the vocabulary: the largest id counts, there may be gaps below it."""
    return max(tokenizer.get_vocab().values()) + 1


def save_marked(folder: Path, *marks: str, **named: str) -> PreTrainedTokenizerFast:
    """Save a tokenizer with special tokens into a folder and return it.

    Args:
        folder: of the checkpoint.
        marks: the special tokens.
        named: special tokens by the names that a family's processor reads.

    """
    tokenizer = tokenizer_with(named)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_placed(folder: Path, places: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """Save a tokenizer with special tokens of given ids, which vLLM's code has as constants.

    Words that have these ids get others. Ids that no word has are of words that no text contains.
    """
    plain = tokenizer_with({})
    content = json.loads(plain.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    wanted = set(places.values())
    moved = [word for word, id in words.items() if id in wanted]
    words.update({word: max(*wanted, len(words)) + 1 + at for at, word in enumerate(moved)})
    for token in content["added_tokens"]:
        token["id"] = words[token["content"]]
    for token in (content["post_processor"] or {}).get("special_tokens", {}).values():
        token["ids"] = [words[word] for word in token["tokens"]]
    taken = set(words.values()) | wanted
    fill = [id for id in range(max(taken)) if id not in taken]
    words.update({f"\x00{id}": id for id in fill})
    words.update(places)
    content["added_tokens"] += [
        {
            "id": id,
            "content": mark,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for mark, id in sorted(places.items(), key=lambda place: place[1])
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token=plain.unk_token,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_processor(folder: Path, name: str, source: str = "processing", **settings: Any) -> None:
    """Copy a processor of this package into the folder, as checkpoints carry theirs.

    Args:
        folder: of the checkpoint.
        name: of the processor's class.
        source: module of this package that has it.
        settings: arguments of the class.

    """
    shutil.copy(Path(__file__).with_name(f"{source}.py"), folder)
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": name,
            "auto_map": {"AutoProcessor": f"{source}.{name}"},
            **settings,
        },
    )
