"""SimCLR and MoCo: augmentations by what defines them, losses and queue against slow loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from toys import CPU, toy

from tcore.data import augment
from tcore.models.knn import knn_accuracy
from tcore.pretraining import moco, simclr

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
SETTINGS = simclr.Settings(architecture="resnet_narrow", epochs=3, batch=32, projection=16, lr=0.003)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, low: float = 0.0, high: float = 1.0, size: int = 12) -> torch.Tensor:
    return torch.empty(n, 3, size, size).uniform_(low, high, generator=stream(99))


def view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return augment.simclr_view(images, generator, (0.2, 1.0), 0.4)


def strong_blur(images: torch.Tensor, generator: torch.Generator, p: float) -> torch.Tensor:
    return augment.blur(images, generator, (1.0, 2.0), p)


# --- augmentations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [augment.resized_crop, augment.flip, augment.jitter, augment.grey, augment.blur, view]
)
def test_every_image_has_its_own_repeatable_draw(function):
    x = noise(1).repeat(64, 1, 1, 1)
    before = x.clone()
    torch.manual_seed(1)
    out = function(x, stream())
    torch.manual_seed(2)
    assert torch.equal(function(x, stream()), out)
    assert not torch.equal(function(x, stream(1)), out)
    assert torch.equal(x, before)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    different = len(out.flatten(1).unique(dim=0))
    least = 25 if function is augment.blur else 45  # half of the images are blurred
    assert different == 2 if function in (augment.flip, augment.grey) else different > least


@pytest.mark.parametrize("function", [augment.flip, augment.jitter, augment.grey, strong_blur])
def test_p_is_the_share_of_images_changed(function):
    x = noise(500, 0.2, 0.8, size=4)
    assert torch.equal(function(x, stream(), p=0), x)
    changed = (function(x, stream(), p=0.3) != x).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.3) < 0.08  # four standard deviations
    assert (function(x, stream(), p=1) != x).flatten(1).any(1).all()


def test_flip_mirrors_left_and_right():
    x = noise(5)
    assert np.array_equal(augment.flip(x, stream(), p=1).numpy(), x.numpy()[..., ::-1])


def test_grey_is_the_luma_in_every_channel():
    x = noise(5)
    expected = np.einsum("c,nchw->nhw", LUMA, x.numpy())
    for channel in augment.grey(x, stream(), p=1).unbind(1):
        np.testing.assert_allclose(channel.numpy(), expected, atol=1e-6)


def test_jitter_changes_colours_in_the_order_it_says():
    """Without clamping, luma maps to luma by one brightness and one contrast, and chroma turns as a whole."""
    strength, x = 0.2, noise(100, 0.45, 0.55)
    out = augment.jitter(x, stream(), strength, p=1).numpy().astype(np.float64)
    yiq = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # NTSC
    (y0, i0, q0), (y1, i1, q1) = (
        np.einsum("kc,nchw->knhw", yiq, v).reshape(3, 100, -1) for v in (x.numpy(), out)
    )
    brightness = y1.mean(1) / y0.mean(1)
    slope = ((y0 - y0.mean(1, keepdims=True)) * y1).sum(1) / y0.var(1) / y0.shape[1]
    fit = brightness[:, None] * y0.mean(1, keepdims=True) + slope[:, None] * (y0 - y0.mean(1, keepdims=True))
    np.testing.assert_allclose(y1, fit, atol=1e-5)
    turn = ((i1 + 1j * q1) / (i0 + 1j * q0)).mean(1)
    np.testing.assert_allclose(i1 + 1j * q1, turn[:, None] * (i0 + 1j * q0), atol=1e-4)
    contrast, saturation, angle = slope / brightness, abs(turn) / slope, np.angle(turn)
    for factor in (brightness, contrast, saturation):
        assert factor.min() >= 0.8 - 1e-3 and factor.max() <= 1.2 + 1e-3
        assert factor.std() > 0.09  # of a uniform draw: 0.4 / sqrt(12) = 0.115
    assert abs(angle).max() <= strength / 4 * 2 * math.pi + 1e-3
    assert angle.std() > 0.15  # 0.1 pi / sqrt(3) = 0.18
    independent = np.corrcoef([brightness, contrast, saturation, angle]) - np.eye(4)
    assert abs(independent).max() < 0.35


def test_jitter_without_strength_changes_nothing():
    x = noise(5)
    torch.testing.assert_close(augment.jitter(x, stream(), strength=0.0, p=1), x, rtol=0, atol=1e-5)


def test_crops_are_windows_of_the_area_and_aspect_asked_for():
    """On two ramps a window shows in the slopes (its width and height) and in the middle (its place)."""
    n, size = 300, 24
    centres = (torch.arange(size) + 0.5) / size
    ramp = torch.zeros(3, size, size)
    ramp[0], ramp[1] = centres, centres.view(-1, 1)
    out = augment.resized_crop(ramp.repeat(n, 1, 1, 1), stream(), scale=(0.2, 0.6)).numpy()
    middle = slice(size // 2 - 2, size // 2 + 2)
    width = (np.diff(out[:, 0, middle, middle], axis=2) * size).mean((1, 2))
    height = (np.diff(out[:, 1, middle, middle], axis=1) * size).mean((1, 2))
    x, y = out[:, 0, middle, middle].mean((1, 2)), out[:, 1, middle, middle].mean((1, 2))
    area, aspect = width * height, width / height
    assert area.min() > 0.2 - 1e-3 and area.max() < 0.6 + 1e-3 and area.std() > 0.1  # uniform: 0.115
    assert aspect.min() > 3 / 4 - 1e-3 and aspect.max() < 4 / 3 + 1e-3 and aspect.std() > 0.1
    for place, extent in ((x, width), (y, height)):
        assert (place - extent / 2).min() > -1e-3 and (place + extent / 2).max() < 1 + 1e-3
        assert (((place - extent / 2) / (1 - extent)).std() - 1 / math.sqrt(12)) == pytest.approx(0, abs=0.03)


def test_the_whole_image_as_window_is_the_image():
    x = noise(5)
    whole = augment.resized_crop(x, stream(), scale=(1.0, 1.0), ratio=1.0)
    torch.testing.assert_close(whole, x, rtol=0, atol=1e-5)
    flat = torch.full((5, 3, 12, 12), 0.3)
    torch.testing.assert_close(augment.resized_crop(flat, stream()), flat, rtol=0, atol=1e-6)


# --- NT-Xent ------------------------------------------------------------------------------------


def slow_nt_xent(z: np.ndarray, temperature: float) -> float:
    """Chen et al. 2020, eq. 1, term by term."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(z)):
        partner = (i + len(z) // 2) % len(z)
        terms = [math.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i]
        total -= math.log(math.exp(z[i] @ z[partner] / temperature) / sum(terms))
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_term_by_term(temperature):
    z = torch.randn(14, 5, generator=stream()) * 3
    assert simclr.nt_xent(z, temperature).item() == pytest.approx(
        slow_nt_xent(z.numpy().astype(np.float64), temperature), rel=1e-5
    )


def test_nt_xent_in_closed_form():
    # Two orthogonal images whose views agree: -1/T + log(e^(1/T) + 2)
    assert simclr.nt_xent(torch.eye(2).repeat(2, 1), 0.5).item() == pytest.approx(
        -2 + math.log(math.e**2 + 2), rel=1e-5
    )
    assert simclr.nt_xent(torch.randn(2, 3), 0.5).item() == 0  # a single image has no negatives


# --- MoCo ---------------------------------------------------------------------------------------


def test_blur_is_scipys():
    x = noise(6, size=32)
    out = augment.blur(x, stream(), sigma=(1.3, 1.3), p=1).numpy()
    exact = x.double().numpy()
    expected = ndimage.gaussian_filter(exact, (0, 0, 1.3, 1.3), mode="mirror", radius=4)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_blur_is_as_strong_as_its_draw():
    """The variance of a blurred point is sigma squared; sigma is uniform in its range."""
    point = torch.zeros(400, 1, 25, 25)
    point[:, :, 12, 12] = 1
    out = augment.blur(point, stream(), sigma=(1.0, 2.0), p=1).numpy()[:, 0]
    place = np.arange(25) - 12
    variance = (out * place**2).sum((1, 2))
    sigma = np.sqrt(variance)
    assert sigma.min() > 0.99 and sigma.max() < 2.0
    assert np.std(sigma) == pytest.approx(1 / 12**0.5, rel=0.1)  # of a uniform draw
    assert (out * place[:, None] ** 2).sum((1, 2)) == pytest.approx(variance, abs=1e-5)


def test_info_nce_term_by_term():
    drawn = torch.randn(17, 5, generator=stream())
    q, k, queue = torch.nn.functional.normalize(drawn, dim=1).split([4, 4, 9])
    total = 0.0
    for a, b in zip(q.double().numpy(), k.double().numpy(), strict=True):
        terms = [math.exp(a @ b / 0.2)] + [math.exp(a @ other / 0.2) for other in queue.double().numpy()]
        total -= math.log(terms[0] / sum(terms))
    assert moco.info_nce(q, k, queue, 0.2).item() == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("size", [3, 5, 7, 12])
def test_the_queue_holds_the_last_keys(size):
    """Against a list that is cut: batches of 5, in queues smaller and larger than one."""
    queue, start, seen = -torch.ones(size, 1), 0, [-1.0] * size
    for step in range(7):
        keys = torch.arange(5.0).view(5, 1) + 5 * step
        start = moco.enqueue(queue, keys, start)
        seen = (seen + keys.flatten().tolist())[-size:]
        assert sorted(queue.flatten().tolist()) == sorted(seen)


def test_the_copy_follows():
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * slow.weight.detach() + 0.1 * fast.weight.detach()
    moco.follow(slow, fast, 0.9)
    torch.testing.assert_close(slow.weight.detach(), expected)


# --- pre-training -------------------------------------------------------------------------------

MOCO = moco.Settings(architecture="resnet_narrow", epochs=3, batch=32, projection=16, queue=64, inertia=0.9)
METHODS = [(simclr, SETTINGS, math.log(63) + 0.5), (moco, MOCO, math.log(65) + 1)]  # chance, and some more


def run(method, settings, seed: int, state: int):
    images = (noise(96, size=16) * 255).to(torch.uint8)
    torch.manual_seed(state)
    return images, *method.pretrain(images, settings, seed, CPU)


@pytest.mark.parametrize(("method", "settings", "chance"), METHODS)
def test_pretraining_learns_and_depends_on_its_seed_alone(method, settings, chance):
    images, encoder, log = run(method, settings, 0, state=1)
    _, again, same = run(method, settings, 0, state=2)
    _, other, _ = run(method, settings, 1, state=1)
    assert log == same and len(log["loss"]) == 3
    assert log["loss"][-1] < chance
    if method is simclr:  # MoCo's first queue is random and easy to tell from keys
        assert log["loss"][-1] < log["loss"][0]
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    assert not torch.equal(encoder.conv1.weight, other.conv1.weight)
    assert not encoder.training and encoder.image_size == 16
    assert all(p.requires_grad for p in encoder.parameters())
    pixels = images.numpy() / 255.0
    np.testing.assert_allclose(encoder.mean.flatten(), pixels.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(encoder.std.flatten(), pixels.std((0, 2, 3)), atol=1e-4)


@pytest.mark.parametrize(("method", "settings"), [(simclr, SETTINGS), (moco, MOCO)])
def test_pretraining_tells_classes_apart(method, settings):
    """Colour templates, of which every view keeps a part: neighbours in feature space are of one class."""
    images = toy(160, 1)
    settings = replace(settings, epochs=15, batch=40, lr=3e-3 if method is simclr else 0.06, jitter=0.1)
    encoder, _ = method.pretrain(images.tensor, settings, 0, CPU)
    assert knn_accuracy(encoder, images) > 0.8


def test_a_transformer_can_be_pretrained():
    images = (noise(8, size=8) * 255).to(torch.uint8)
    settings = replace(SETTINGS, architecture="vit", epochs=1, batch=4)
    encoder, log = simclr.pretrain(images, settings, 0, CPU)
    assert encoder.dim == 512 and math.isfinite(log["loss"][0])


@pytest.mark.parametrize(("method", "settings"), [(simclr, SETTINGS), (moco, MOCO)])
def test_pretraining_crops_by_the_images_aspects(method, settings):
    images = (noise(32, size=16) * 255).to(torch.uint8)
    settings = replace(settings, epochs=1)
    plain, same, wide = (
        method.pretrain(images, settings, 0, CPU, aspects)[0].conv1.weight
        for aspects in (None, torch.ones(32), torch.full((32,), 2.0))
    )
    assert torch.equal(plain, same) and not torch.equal(plain, wide)
