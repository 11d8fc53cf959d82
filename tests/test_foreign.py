"""Foreign checkpoints in the layouts that are about, and hostile ones, which are never executed."""

import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tcore.files import InputError
from tcore.models.encoder import Encoder, extract_features, load_encoder
from tcore.received.checkpoint import import_encoder, read_checkpoint
from tcore.torchvision_cpu import torchvision

SCRIPT = Path(__file__).parents[1] / "scripts/import_encoder.py"
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Repacked(nn.Module):
    """torchvision's children in a Sequential, with the projection beside it."""

    def __init__(self, source: nn.Module, left_out: tuple[type, ...], depth: int = 1):
        super().__init__()
        children = [m for m in source.children() if not isinstance(m, left_out)]
        self.f = nn.Sequential(*children)
        for _ in range(depth - 1):
            self.f = nn.ModuleDict({"f": self.f})
        self.g = nn.Sequential(nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU())


@pytest.fixture(scope="module")
def cifar():
    """torchvision's ResNet-18 with a 3x3 stem, and its features of two images, without max-pooling."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    fc, pool = model.fc, model.maxpool
    model.fc, model.maxpool = nn.Identity(), nn.Identity()
    with torch.no_grad():
        features = model((images / 255 - 0.5) / 0.5)
    model.fc, model.maxpool = fc, pool
    return model, images, features


def layouts(model: nn.Module) -> dict[str, dict]:
    plain = model.state_dict()
    other = torchvision.models.resnet18().state_dict()
    badencoder = Repacked(model, (nn.MaxPool2d, nn.Linear), depth=2).state_dict()
    assert "f.f.0.weight" in badencoder and "f.f.3.0.conv1.weight" in badencoder
    moco = {f"module.encoder_q.{k}": v for k, v in plain.items()}
    moco |= {f"module.encoder_k.{k}": v for k, v in other.items()}
    moco |= {"module.queue": torch.zeros(128, 4), "module.queue_ptr": torch.zeros(1)}
    backbone = {f"backbone.{k}": v for k, v in plain.items()} | {"projector.0.bias": torch.ones(1)}
    return {
        "plain": plain,
        "badencoder": {"epoch": 1000, "state_dict": badencoder, "optimizer": {"state": {}}},
        "only f": {k: v for k, v in badencoder.items() if k.startswith("f.")},
        "with pooling": {"state_dict": Repacked(model, (nn.Linear,)).state_dict()},
        "with everything": Repacked(model, ()).state_dict(),
        "moco": {"epoch": 200, "arch": "resnet18", "state_dict": moco},
        "backbone": {"model": backbone},
        "visual": {"encoder": {f"visual.{k}": v for k, v in plain.items()}},
    }


@pytest.mark.parametrize(
    "layout",
    ["plain", "badencoder", "only f", "with pooling", "with everything", "moco", "backbone", "visual"],
)
def test_every_layout_gives_torchvisions_features(cifar, tmp_path, layout):
    model, images, features = cifar
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(layouts(model)[layout], path)
    encoder = import_encoder(path, "resnet18", 8, *HALVES)
    assert not encoder.training
    torch.testing.assert_close(extract_features(encoder, images), features, rtol=1e-4, atol=1e-5)


def test_safetensors_are_read_too(cifar, tmp_path):
    model = cifar[0]
    save_file({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "c.safetensors")
    found = read_checkpoint(tmp_path / "c.safetensors")
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


class Hostile:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch, beside tensors"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, how):
    path, mark = tmp_path / "nice.pth", tmp_path / "executed"
    hostile = Hostile(f"touch {mark}")
    if how == "pickle":
        path.write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        torch.save(hostile if how == "torch" else {"conv1.weight": torch.ones(1), "epoch": hostile}, path)
    with pytest.raises(InputError, match=r"nice\.pth: .*without running code"):
        read_checkpoint(path)
    assert not mark.exists()
    with pytest.raises(InputError, match=r"nice\.pth: not a readable safetensors file"):
        load_encoder(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(hostile))  # the bait works
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "without running code"),
        (b"PK\x03\x04 half a zip", "without running code"),
        (["a list"], "holds a list"),
        ({"epoch": 3, "state_dict": {}}, "no encoder's tensors in it"),
        ({"g.0.weight": torch.ones(2)}, "no encoder's tensors in it, only 'g.0.weight'"),
        ({"a.bn1.bias": torch.ones(1)}, "missing: conv1.weight.* unexpected: a.bn1.bias"),
        ({"bn1.bias": torch.ones(1), "module.bn1.bias": torch.ones(1)}, "two tensors are called bn1"),
        ({"conv1.weight": torch.ones(1), "0.weight": torch.ones(1)}, "two tensors are called conv1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, content, message):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=rf"other\.pt: .*{message}"):
        import_encoder(path, "resnet_narrow", 8, *HALVES)


def test_the_wrong_architecture_is_told_from_the_right_one(cifar, tmp_path):
    torch.save(cifar[0].state_dict(), tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"c\.pt: .*another shape: conv1.weight \(64, 3, 3, 3\)"):
        import_encoder(tmp_path / "c.pt", "resnet18_224", 224, *HALVES)
    with pytest.raises(InputError, match=r"unknown architecture 'resnet50'"):
        import_encoder(tmp_path / "c.pt", "resnet50", 224, *HALVES)
    with pytest.raises(InputError, match=r"std .*positive"):
        import_encoder(tmp_path / "c.pt", "resnet18", 32, (0, 0, 0), (1, 0, 1))


def command(monkeypatch, checkpoint: Path, out: Path) -> None:
    arguments = f"--checkpoint {checkpoint} --architecture resnet_narrow --image-size 16"
    arguments += f" --mean 0.4 0.5 0.6 --std 0.1 0.2 0.3 --encoder {out}"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_command(monkeypatch, tmp_path):
    encoder = Encoder("resnet_narrow", 16)
    torch.save({"state_dict": {f"module.{k}": v for k, v in encoder.state_dict().items()}}, tmp_path / "c.pt")
    command(monkeypatch, tmp_path / "c.pt", tmp_path / "encoder.safetensors")
    found = load_encoder(tmp_path / "encoder.safetensors")
    assert found.architecture == "resnet_narrow" and found.image_size == 16
    assert found.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert found.std.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), encoder.parameters(), strict=True))


def test_the_command_leaves_nothing_behind_when_it_fails(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*gone\.pt: no such file"):
        command(monkeypatch, tmp_path / "gone.pt", tmp_path / "encoder.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_and_programs_instead_of_weights(tmp_path):
    encoder = Encoder("resnet_tiny", 8)
    torch.jit.trace(encoder.eval(), torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "program.pt"))
    with pytest.raises(InputError, match=r"program\.pt: not a checkpoint .*without running code"):
        import_encoder(tmp_path / "program.pt", "resnet_tiny", 8, *HALVES)
    encoder.state_dict()["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(encoder.state_dict(), tmp_path / "diverged.pt")
    with pytest.raises(InputError, match=r"diverged\.pt: not all numbers in layer1\.0\.conv1\.weight"):
        import_encoder(tmp_path / "diverged.pt", "resnet_tiny", 8, *HALVES)
