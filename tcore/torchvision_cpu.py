"""torchvision that imports beside any build of torch: `from tcore.torchvision_cpu import torchvision`.

The registry's torchvision wheel is built for CUDA. Beside a CPU-only torch its compiled
operators cannot be loaded, and the import fails because two of them are described but do not
exist. Declaring them beforehand mends that; box operators and torchvision.io stay unavailable.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def _compiled_operators_load() -> bool:
    folder = Path(find_spec("torchvision").submodule_search_locations[0])
    try:
        for library in folder.glob("_C.*"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


if not _compiled_operators_load():
    _declarations = torch.library.Library("torchvision", "DEF")  # undone when it is collected: kept here
    for _name in ("nms", "qnms"):
        _declarations.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

__all__ = ["torchvision"]
