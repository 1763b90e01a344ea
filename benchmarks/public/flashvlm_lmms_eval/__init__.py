# SPDX-License-Identifier: Apache-2.0
"""lmms-eval models that send a visual token budget with every request."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """Return the models' names for lmms-eval, which imports a model's module when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="flashvlm_server",
            chat_class_path="flashvlm_lmms_eval.server.FlashVLMServer",
        ),
        ModelManifest(
            model_id="flashvlm_llm",
            chat_class_path="flashvlm_lmms_eval.offline.FlashVLMEngine",
        ),
    ]
