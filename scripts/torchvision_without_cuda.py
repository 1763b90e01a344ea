# SPDX-License-Identifier: Apache-2.0
"""Let a CUDA build of torchvision be imported next to a CPU build of PyTorch.

``prepare_environment.py`` copies this file into an environment that needs it, with a ``.pth``
file that imports it at start-up; nothing imports it from here.

Why: torchvision describes the shapes of ``nms`` and ``qnms`` to PyTorch while it is imported.
Their schemas live in its compiled library, which a CPU-only machine cannot load, so the import
stops with "operator torchvision::nms does not exist". Declaring the two schemas beforehand is
enough: vLLM and Transformers use torchvision to resize images, never these operators, and
calling one still fails with PyTorch's own "not implemented" message.

Start-up stays cheap: PyTorch is imported only when torchvision is.
"""

import glob
import importlib.machinery
import os
import sys

# From torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # PyTorch forgets the schemas once their Library object is collected.


class SchemasFirst:
    """A finder that finds nothing: it only acts just before torchvision is imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.submodule_search_locations:
            declare_schemas(list(spec.submodule_search_locations))
        return None


def declare_schemas(folders):
    try:
        import torch
    except ImportError:
        return  # torchvision's own import says this better.
    for folder in folders:
        for compiled in glob.glob(os.path.join(folder, "_C*")):
            try:
                torch.ops.load_library(compiled)
                return  # A matching build was installed meanwhile: its own schemas count.
            except (OSError, RuntimeError):
                continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        try:
            library.define(schema)
        except RuntimeError:
            continue  # Declared by someone else, which is just as good.
    _libraries.append(library)


sys.meta_path.insert(0, SchemasFirst)
