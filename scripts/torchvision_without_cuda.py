# SPDX-License-Identifier: Apache-2.0
"""Let a CUDA build of torchvision be imported next to a CPU build of PyTorch.

``prepare_environment.py`` copies this file into an environment that needs it, with a ``.pth``
file that imports it at start-up; nothing imports it from here.

Why: torchvision describes the shapes of ``nms`` and ``qnms`` to PyTorch while it is imported.
Their schemas are in its compiled library, which a CPU-only machine cannot load, so the import
stops with "operator torchvision::nms does not exist". Declaring the two schemas beforehand is
enough: vLLM and Transformers use torchvision to resize images, never these operators, and
calling one still fails with PyTorch's own "not implemented" message.

Start-up stays cheap: PyTorch is imported only when torchvision is.
"""

from __future__ import annotations

import glob
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# From torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []
"""PyTorch drops the schemas when their Library object is collected."""


class SchemasFirst:
    """A finder that declares the schemas just before torchvision is imported, and finds nothing."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.submodule_search_locations:
            declare_schemas(list(spec.submodule_search_locations))
        return None


def declare_schemas(folders: Sequence[str]) -> None:
    try:
        import torch
    except ImportError:
        return  # The message of torchvision's own import is clearer.
    for folder in folders:
        for compiled in glob.glob(os.path.join(folder, "_C*")):
            try:
                torch.ops.load_library(compiled)
                return  # A matching build was installed meanwhile: it has its own schemas.
            except (OSError, RuntimeError):
                continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        try:
            library.define(schema)
        except RuntimeError:
            continue  # Declared already.
    _libraries.append(library)


sys.meta_path.insert(0, SchemasFirst)
