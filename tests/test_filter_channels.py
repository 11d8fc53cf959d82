"""Channel filtering where it can be said by hand which mask falls, and by the numbers of a ResNet-18."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcore.files import InputError
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import Encoder
from tcore.stages import filter_channels as stage

RED, GREEN, TRAITOR, DEAD = range(4)
SETTINGS = stage.Settings(
    untrusted_share=0.25, stop_accuracy=0.6, epochs=60, lr=0.05, batch=16, unlearn_lr=0.1, window=3
)


class Toy(nn.Module):
    """A 1x1 convolution to four channels, batch norm that does nothing, mean."""

    image_size = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[[RED, TRAITOR], 0] = 1.0
            self.conv.weight[GREEN, 1] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).mean((2, 3))


@pytest.fixture
def toy() -> tuple[Classifier, Tensor, Tensor]:
    """Red images are class 0, green ones class 1; the traitor sees red and says class 1.

    With masks m and brightness v the logits are (8 m_red v, 5 m_traitor v) for red and
    (0, 8 m_green v) for green images. So the loss falls with m_red and m_green whatever they
    are, rises with m_traitor, and does not know m_dead: 1, 1, 0, and 1 exactly.
    """
    head = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, RED], head.weight[1, GREEN], head.weight[1, TRAITOR] = 8.0, 8.0, 5.0
    labels = torch.arange(64) % 2
    images = torch.zeros(64, 3, 4, 4, dtype=torch.uint8)
    brightness = torch.randint(100, 256, (64, 4, 4), generator=torch.Generator().manual_seed(0))
    images[torch.arange(64), labels] = brightness.to(torch.uint8)
    return Classifier(Toy(), head), images, labels


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# --- recovery -----------------------------------------------------------------------------------


def test_the_mask_of_a_harmful_channel_falls_and_no_other(toy):
    model, images, labels = toy
    masks, trace = stage.recover(model, images, labels, SETTINGS, seed=0)
    assert masks["conv"].tolist() == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert len(trace) == 60 and trace[-1] == 1.0


def test_masks_move_at_adams_rate_and_are_averaged_over_the_last_sixth(toy):
    # Under a gradient of one sign and nearly one size Adam moves by about lr a step: after 12 steps
    # of 0.01 the mask is at 0.88; the mean of the last two epochs' is 0.885.
    model, images, labels = toy
    settings = replace(SETTINGS, epochs=12, lr=0.01, batch=64)
    for epochs, expected, tolerance in ((1, 0.99, 1e-4), (12, 0.885, 4e-3)):
        masks, _ = stage.recover(model, images, labels, replace(settings, epochs=epochs), seed=0)
        assert masks["conv"][TRAITOR].item() == pytest.approx(expected, abs=tolerance)


def test_recovery_leaves_the_model_as_it_is(toy):
    model, images, labels = toy
    before, out = snapshot(model), logits(model, images)
    stage.recover(model, images, labels, SETTINGS, seed=0)
    assert not changed(model, before)
    assert torch.equal(logits(model, images), out)  # the masks are gone


# --- unlearning ---------------------------------------------------------------------------------


def test_unlearning_touches_batch_norm_alone_and_stops_below_the_threshold(toy):
    model, images, labels = toy
    before, loss = snapshot(model), F.cross_entropy(logits(model, images), labels)
    trace = stage.unlearn(model, images, labels, SETTINGS, seed=0)
    assert changed(model, before) == {"encoder.bn.weight", "encoder.bn.bias"}
    assert len(trace) > 1 and trace[-1] < 0.6
    assert all(accuracy >= 0.6 for accuracy in trace[:-1])
    assert F.cross_entropy(logits(model, images), labels) > 2 * loss


def test_unlearning_ends_after_its_epochs_at_the_latest(toy):
    model, images, labels = toy
    trace = stage.unlearn(model, images, labels, replace(SETTINGS, stop_accuracy=0.0, unlearn_epochs=2), 0)
    assert len(trace) == 2 * 4 - 3 + 1  # 64 images in batches of 16, windows of 3


# --- both ---------------------------------------------------------------------------------------


def test_the_traitor_is_found_and_the_model_stays_as_it_was(toy):
    model, images, labels = toy
    model.train()
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    subset = torch.arange(64) < 40
    settings = replace(SETTINGS, stop_accuracy=2.0, unlearn_lr=1e-3)  # unlearning ends with its first window
    torch.manual_seed(1)
    masks, untrusted, log = stage.filter_channels(model, images, labels, subset, settings, seed=0)
    assert not changed(model, before)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training and model.encoder.training
    assert untrusted["conv"].tolist() == [False, False, True, False]
    assert masks["conv"].tolist() == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert len(log["unlearning_accuracy"]) == 1 and len(log["recovery_accuracy"]) == 60
    torch.manual_seed(2)
    again = stage.filter_channels(copy.deepcopy(model), images, labels, subset, settings, seed=0)[0]
    assert torch.equal(again["conv"], masks["conv"])


def test_channels_by_clps_bound_are_those_with_the_largest(toy):
    model, images, labels = toy
    with torch.no_grad():
        model.encoder.conv.weight[DEAD, 2] = 3.0
        model.encoder.bn.weight[GREEN] = 5.0  # bounds 1, 5, 1 and 3, for a variance of 1
    masks, untrusted, _ = stage.filter_channels(
        model, images, labels, labels >= 0, replace(SETTINGS, rank="lipschitz", untrusted_share=0.5), seed=0
    )
    expected = torch.tensor([1.0, 5, 1, 3]) / (1 + model.encoder.bn.eps) ** 0.5
    torch.testing.assert_close(masks["conv"], -expected)
    assert untrusted["conv"].tolist() == [k in (GREEN, DEAD) for k in range(4)]


def test_random_channels_are_as_many_in_each_layer_and_depend_on_the_seed_alone():
    model = Classifier(Encoder("resnet_narrow", 32), nn.Linear(192, 2))
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2)
    settings = stage.Settings(rank="random", untrusted_share=0.25)
    chosen = [
        stage.filter_channels(model, images, labels, labels >= 0, settings, seed)[1] for seed in (0, 0, 1)
    ]
    for name, layer in stage.layers(model.encoder).items():
        first, same, other = (untrusted[name] for untrusted in chosen)
        assert first.sum() == other.sum() == layer.out_channels // 4
        assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(InputError, match=r"filter_channels.rank = 'best' should be one of"):
        stage.filter_channels(model, images, labels, labels >= 0, replace(settings, rank="best"), 0)


def test_recovery_sees_the_subset_alone(toy):
    model, images, labels = toy
    subset = torch.arange(64) < 40
    settings = replace(SETTINGS, unlearn_lr=0.0, epochs=4)  # what unlearning sees makes no difference
    lies = torch.where(subset, labels, 1 - labels)
    honest, lied, all_lies = (
        stage.filter_channels(model, images, given, seen, settings, seed=0)[0]["conv"]
        for given, seen in ((labels, subset), (lies, subset), (lies, torch.ones_like(subset)))
    )
    assert torch.equal(honest, lied) and not torch.equal(honest, all_lies)


def test_a_tenth_of_each_layer_of_a_resnet18():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 8)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    settings = stage.Settings(epochs=1, unlearn_epochs=1)
    model = Classifier(encoder, nn.Linear(512, 2))
    masks, untrusted, _ = stage.filter_channels(
        model, images, torch.arange(8) % 2, torch.ones(8, dtype=torch.bool), settings, seed=0
    )
    assert sum(p.numel() for p in stage.norm_parameters(encoder)) == 9600
    assert masks.keys() == untrusted.keys() and len(masks) == 20
    assert sum(len(mask) for mask in masks.values()) == 4800
    assert {len(mask): int(untrusted[name].sum()) for name, mask in masks.items()} == {
        64: 6,
        128: 12,
        256: 25,
        512: 51,
    }
    for name, mask in masks.items():
        assert mask.min() >= 0 and mask.max() <= 1
        assert mask[untrusted[name]].max() <= mask[~untrusted[name]].min()


# --- layers of other kinds ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (5, 7, 6)),
        (nn.Conv2d(6, 4, 3, groups=2), (5, 6, 7, 7)),
        (nn.Linear(6, 4, bias=False), (5, 6)),
    ],
)
def test_a_mask_scales_the_weights_and_not_the_bias(layer, shape):
    x, mask = torch.randn(shape), torch.tensor([0.0, 0.3, 1.0, 0.5])
    scaled = copy.deepcopy(layer)
    with torch.no_grad():
        scaled.weight *= mask.view(-1, *[1] * (layer.weight.ndim - 1))
    plain = layer(x)
    handle = stage.mask_output(layer, mask)
    torch.testing.assert_close(layer(x), scaled(x))
    handle.remove()
    assert torch.equal(layer(x), plain)


def test_a_transformer_has_a_mask_for_each_row_of_each_linear_layer():
    torch.manual_seed(0)
    encoder = Encoder("vit", 8)
    model, images = (
        Classifier(encoder, nn.Linear(512, 2)),
        torch.randint(0, 256, (8, 3, 8, 8)).to(torch.uint8),
    )
    before = snapshot(model)
    stage.unlearn(model, images, torch.arange(8) % 2, stage.Settings(unlearn_epochs=1), seed=0)
    norms = {f"encoder.blocks.{b}.norm{i}" for b in range(6) for i in (1, 2)} | {"encoder.norm"}
    assert changed(model, before) == {f"{norm}.{p}" for norm in norms for p in ("weight", "bias")}
    masks, untrusted, _ = stage.filter_channels(
        model,
        images,
        torch.arange(8) % 2,
        torch.arange(8) < 6,
        stage.Settings(epochs=2, unlearn_epochs=1),
        seed=0,
    )
    rows = {"attention.qkv": 1536, "attention.out": 512, "mlp.0": 512, "mlp.2": 512}
    expected = {f"blocks.{b}.{name}": n for b in range(6) for name, n in rows.items()} | {
        "tokens.linear": 512
    }
    assert {name: len(mask) for name, mask in masks.items()} == expected
    assert {name: int(flags.sum()) for name, flags in untrusted.items()} == {
        name: n // 10 for name, n in expected.items()
    }
    assert all(mask.min() < 1 for mask in masks.values())


def test_an_encoder_without_normalisation_is_refused(toy):
    model, images, labels = toy
    model.encoder.bn = nn.Identity()
    with pytest.raises(InputError, match="no normalisation layers"):
        stage.unlearn(model, images, labels, SETTINGS, seed=0)


def test_a_layer_whose_weights_are_used_without_calling_it_is_refused(toy):
    model, images, labels = toy
    model.encoder.last = nn.Conv2d(4, 4, 1)
    model.encoder.forward = lambda x: model.encoder.last(F.conv2d(x, model.encoder.conv.weight)).mean((2, 3))
    with pytest.raises(InputError, match="conv without calling it"):
        stage.recover(model, images, labels, SETTINGS, seed=0)
