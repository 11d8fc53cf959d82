"""torchvision imports beside the installed torch, whether or not its compiled operators load."""

import subprocess
import sys

USE = """
import torch
from tcore.torchvision_cpu import torchvision
from torchvision.transforms import v2
from torchvision.datasets import FakeData
assert torchvision.models.resnet18()(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
assert v2.functional.horizontal_flip(torch.tensor([[[1, 2]]])).tolist() == [[[2, 1]]]
assert len(FakeData(3)) == 3
print(torchvision.__version__.split("+")[0])
"""

# A torch whose compiled operators load: the operators exist already, a second declaration would fail.
COMPILED = """
import torch
kept = []
def load_library(path):
    if kept:
        raise OSError("loaded once is enough")
    kept.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        kept[0].define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.ops.load_library = load_library
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_beside_the_installed_torch():
    assert run(USE) == "0.28.0"


def test_nothing_is_declared_where_the_operators_load():
    assert run(COMPILED + USE) == "0.28.0"
