"""The convolution's weight gradient is the library's; bfloat16 is taken where it can be and may be."""

import copy

import pytest
import torch
from torch import nn

from tcore.device import PRECISION, arithmetic
from tcore.models import convolution
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.convolution import Convolution
from tcore.models.encoder import Encoder

SHAPES = [  # channels in and out, side, kernel, stride, padding
    (3, 8, 8, 3, 2, 1),
    (8, 16, 4, 3, 1, 1),
    (16, 8, 4, 1, 2, 0),
    (4, 6, 5, (3, 1), (2, 1), (1, 0)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_the_librarys_weight_gradient(shape):
    inside, outside, side, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False).double()
    x = torch.randn(5, inside, side, side, generator=generator, dtype=torch.float64)
    g = torch.randn(layer(x).shape, generator=generator, dtype=torch.float64)
    layer(x).backward(g)
    found = convolution.product(x, layer.weight.shape, g, layer.stride, layer.padding)
    torch.testing.assert_close(found, layer.weight.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", [4, 12])  # small maps take the product, large ones do not
def test_gradients_in_bfloat16_are_those_of_a_plain_convolution(side, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, 3, 1, 1, bias=bias)
    ours = copy.deepcopy(plain)
    convolution.adopt(ours)
    assert type(ours) is Convolution
    found = []
    for layer in (plain, ours):
        x = torch.randn(6, 8, side, side, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        found.append([y.detach().float(), x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.01 * one.norm()  # bfloat16 has three digits


def test_only_plain_convolutions_are_taken_over_and_names_stay():
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), nn.Conv2d(4, 4, 3, padding="same"),
        Own(4, 4, 1),
    )  # fmt: skip
    names = list(network.state_dict())
    convolution.adopt(network)
    assert [type(layer) is Convolution for layer in network] == [True, *[False] * 5]
    assert list(network.state_dict()) == names
    encoder = Encoder("resnet_tiny", 16)
    assert all(type(m) is Convolution for m in encoder.modules() if isinstance(m, nn.Conv2d))


def test_the_precision_can_be_set_and_is_the_processors_otherwise(monkeypatch):
    cpu = torch.device("cpu")
    assert arithmetic(cpu) == "float32"  # conftest.py
    monkeypatch.setenv(PRECISION, "auto")
    for has_it, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_it=has_it: {"avx512_bf16": has_it})
        assert arithmetic(cpu) == expected
    assert arithmetic(torch.device("cuda")) == "bfloat16"
    monkeypatch.setenv(PRECISION, "float32")
    assert arithmetic(torch.device("cuda")) == "float32"


def test_the_head_of_a_classifier_computes_in_float32():
    encoder = Encoder("resnet_tiny", 16)
    model = Classifier(encoder, heads.new_head(encoder.dim, 3, heads.Settings(hidden=(8, 4)), 0)).eval()
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            features, found = encoder(x), model(x)
        assert features.dtype == found.dtype == torch.float32
        assert torch.equal(found, model.head(features)) and not torch.equal(features, encoder(x))
