"""Networks that others define: torchvision's, timm's, the user's own, and the one whose weights install."""

import importlib.util
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcore.files import InputError, save_tensors
from tcore.models import elsewhere
from tcore.models import head as heads
from tcore.models.classifier import Classifier, load_classifier, save_classifier
from tcore.models.efficientnet import SameConv
from tcore.models.encoder import Encoder, extract_features, load_encoder, save_encoder
from tcore.received.checkpoint import import_encoder
from tcore.torchvision_cpu import torchvision

HALVES = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
OWN = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("ran").touch()

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 3, groups=1), nn.BatchNorm2d(5), nn.ReLU())

class Flat(Net):
    def forward(self, x):
        return super().forward(x).mean((1, 2, 3))

def nothing():
    return 3
"""


def images(size: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext_atto"])
def test_features_are_what_the_librarys_classifier_gets(tmp_path, name):
    """Read from a checkpoint with a wrapper and the classifier in it; every parameter is random."""
    torch.manual_seed(0)
    if name == "convnext_atto":
        timm = pytest.importorskip("timm")
        library, model, last = "timm", timm.create_model(name), "head.fc"
    else:
        library, model = "torchvision", torchvision.models.get_model(name)
        last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim < 2 else tensor.mul_(1.1)
    seen = []
    model.eval().get_submodule(last).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model((images(32) / 255 - 0.5) / 0.25)
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "c.pth")
    encoder = import_encoder(tmp_path / "c.pth", f"{library}:{name}", 32, *HALVES)
    scale = seen[0].abs().max()
    torch.testing.assert_close(
        extract_features(encoder, images(32)) / scale, seen[0] / scale, rtol=0, atol=1e-5
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    again = load_encoder(tmp_path / "encoder.safetensors")
    assert torch.equal(extract_features(again, images(32)), extract_features(encoder, images(32)))


def test_a_checkpoint_of_another_depth_or_with_half_the_keys_is_refused(tmp_path):
    deep = torchvision.models.resnet34().state_dict()
    torch.save(deep, tmp_path / "deep.pth")
    with pytest.raises(InputError, match=r"deep\.pth: .*unexpected: layer1\.2"):
        import_encoder(tmp_path / "deep.pth", "torchvision:resnet18", 32, *HALVES)
    torch.save(dict(list(deep.items())[: len(deep) // 2]), tmp_path / "half.pth")
    with pytest.raises(InputError, match=r"half\.pth: .*missing: layer"):
        import_encoder(tmp_path / "half.pth", "torchvision:resnet34", 32, *HALVES)
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "none.pth")
    with pytest.raises(InputError, match="no encoder's tensors"):
        import_encoder(tmp_path / "none.pth", "torchvision:resnet18", 32, *HALVES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet81", "resnet81: no such .* see .*resnet18"),
        ("torchvision:googlenet", "no such classification network"),
        ("torchvision:squeezenet1_1", "does not end in a linear classifier"),
        ("torchvision:vit_b_16", r"vit_b_16: .*(indivisible|divisible|patch)"),
        ("resnet81", "torchvision:<name>"),
    ],
)
def test_what_is_no_network_for_these_images_is_said(name, message):
    with pytest.raises(InputError, match=message):
        Encoder(name, 30)


def test_sizes_and_constants_are_those_of_the_librarys_weights():
    assert elsewhere.known("torchvision:resnet18") == {
        "image_size": 224,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert elsewhere.known("my.net:Net") == {}


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_the_message_says_how_to_get_it():
    with pytest.raises(InputError, match=r"timm:resnet18: timm is not installed .*pip install timm"):
        Encoder("timm:resnet18", 32)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own, in a folder that can be imported from; importing it leaves a file `ran`."""
    (tmp_path / "my_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_nets", None)


def test_a_network_of_ones_own_runs_only_where_the_user_says_so(own, monkeypatch):
    tensors = {"network.0.weight": torch.zeros(5, 3, 3, 3), "network.0.bias": torch.ones(5)}
    path = own / "stranger.safetensors"
    save_tensors(path, tensors, kind="encoder", architecture="my_nets:Net", image_size=8)
    for allowed in ("", "my_nets:Flat other:Net"):
        monkeypatch.setenv(elsewhere.ALLOWED, allowed)
        with pytest.raises(InputError, match=r"my_nets:Net: .*run_code: true"):
            load_encoder(path)
    assert not (own / "ran").exists()
    monkeypatch.setenv(elsewhere.ALLOWED, "other:Net my_nets:Net")
    with pytest.raises(InputError, match=r"stranger.safetensors: .*missing: network\.1"):
        load_encoder(path)
    assert (own / "ran").exists()


def test_a_network_of_ones_own_through_a_file_and_back(own, monkeypatch):
    monkeypatch.setenv(elsewhere.ALLOWED, "my_nets:Net")
    torch.manual_seed(0)
    encoder = Encoder("my_nets:Net", 8)
    torch.save({f"net.{k}": v for k, v in encoder.network.state_dict().items()}, own / "c.pt")
    assert encoder.dim == 5  # a map of features is averaged over its places
    read = import_encoder(own / "c.pt", "my_nets:Net", 8, *HALVES)
    pixels = (images(8) / 255 - 0.5) / 0.25
    expected = F.conv2d(pixels, encoder.network[0].weight, encoder.network[0].bias) / math.sqrt(1 + 1e-5)
    expected = expected.relu().mean((2, 3))
    torch.testing.assert_close(extract_features(read, images(8)), expected.detach(), rtol=1e-4, atol=1e-5)
    save_classifier(own / "m.safetensors", Classifier(read, heads.Head(5, 2, heads.Settings())), ("a", "b"))
    assert load_classifier(own / "m.safetensors").encoder.architecture == "my_nets:Net"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_nets:Flat", r"gives \(2,\), not features"),
        ("my_nets:nothing", "should return an nn.Module, not int"),
        ("my_nets:Gone", "AttributeError"),
        ("no_nets:Net", "ModuleNotFoundError.*PYTHONPATH"),
    ],
)
def test_what_is_wrong_with_a_network_of_ones_own_is_said(own, monkeypatch, name, message):
    monkeypatch.setenv(elsewhere.ALLOWED, name)
    with pytest.raises(InputError, match=message):
        Encoder(name, 8)


# EfficientNet-Lite0


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (1, 1)])
def test_convolutions_pad_as_tensorflow_does(size, kernel, stride):
    """Against the definition: ceil(n / s) outputs, the first half of the padding rounded down."""
    torch.manual_seed(0)
    layer = SameConv(4, 4, kernel, stride, groups=2).double()
    x = torch.randn(2, 4, size, size, dtype=torch.float64)
    outputs = math.ceil(size / stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    padded = torch.zeros(2, 4, size + 20, size + 20, dtype=torch.float64)
    padded[..., 10 : 10 + size, 10 : 10 + size] = x
    expected = torch.zeros(2, 4, outputs, outputs, dtype=torch.float64)
    for i in range(outputs):
        for j in range(outputs):
            top, left = (10 - before + stride * at for at in (i, j))
            seen = padded[..., top : top + kernel, left : left + kernel]
            for group in (slice(0, 2), slice(2, 4)):
                expected[:, group, i, j] = torch.einsum("nchw,ochw->no", seen[:, group], layer.weight[group])
    torch.testing.assert_close(layer(x), expected)


def test_efficientnet_has_the_published_size():
    encoder = Encoder("efficientnet_lite0", 32)
    count = sum(p.numel() for p in encoder.parameters())
    assert count + 1280 * 1000 + 1000 == 4_652_008  # with the classifier
    assert extract_features(encoder, images(32)).shape == (3, 1280)


def test_efficientnet_is_timms(tmp_path):
    """Every parameter random, in the order of timm's, under the names of the package with the weights."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    names = Encoder("efficientnet_lite0", 65).state_dict()
    tensors = dict(zip(names, model.state_dict().values(), strict=True))
    torch.save(tensors | {"_fc.bias": torch.zeros(1000)}, tmp_path / "c.pth")
    encoder = import_encoder(tmp_path / "c.pth", "efficientnet_lite0", 65, *HALVES)
    with torch.no_grad():
        expected = model((images(65) / 255 - 0.5) / 0.25)
    torch.testing.assert_close(extract_features(encoder, images(65)), expected, rtol=1e-4, atol=1e-5)


def test_the_command_fills_in_what_is_known(tmp_path, monkeypatch, capsys):
    from tcore import __main__ as command

    (tmp_path / "e.pth").touch()
    flags = ["--encoder", str(tmp_path / "e.pth"), "--images", str(tmp_path), "--name", "x"]

    def entry(*more: str) -> dict:
        config = command.own_config(command.parser().parse_args(["secure", *flags, *more]))
        return json.loads(json.dumps(config["encoders"]["x_encoder"]))

    found = entry("--architecture", "torchvision:mobilenet_v2", "--image-size", "96")
    assert found["image_size"] == 96 and found["mean"] == [0.485, 0.456, 0.406] and "run_code" not in found
    assert "As for the weights that come with" in capsys.readouterr().out
    assert entry("--architecture", "efficientnet_lite0")["std"] == [128 / 255] * 3
    with pytest.raises(InputError, match=r"--mean --std: not known for resnet18;"):
        entry("--architecture", "resnet18", "--image-size", "32")
    values = ["--image-size", "8", "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    assert entry("--architecture", "a.b:Net", *values, "--run-code")["run_code"] is True
