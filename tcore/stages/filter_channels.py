"""Encoder Channel Filtering: the channels that cannot be trusted (paper: 4.2, Alg. 3).

(a) Unlearning: gradient ascent of CE over all of D, on the scales and shifts of the
    normalisation layers only, until training accuracy falls below `stop_accuracy`.
    The result is theta_hat.
(b) Recovery: masks m in [0, 1], one per output channel of each convolution and each linear
    layer of the encoder, start at 1 and descend CE over the clean subset through
    m * theta_hat (eq. 5), clipped after each step.
(c) In each of these layers the floor(share C_out) channels with the smallest mask are untrusted.

The head is the suspect one and stays frozen. Batch norm uses its stored statistics
throughout: in training mode a mask in front of it would have no gradient. The masks ranked
are means over the last sixth of the epochs, which breaks ties at 0 and 1.
`rank` has two other choices of channels, of the same number, to see what (a) and (b) are worth; their
"masks" are what is ranked: random numbers, or minus CLP's Lipschitz bound (of layers without batch norm
the weights' norm).
Narrow encoders need a larger share than the paper's tenth. What share an encoder needs cannot be told
without the trigger (docs/lab/channels.md).
Not in the paper: optimiser, rate, clipping and check interval of (a), taken from RNP
(Li et al., ICML 2023). A mask scales a layer's output but for its bias, the same as its weights.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import trange

from tcore import seeds
from tcore.device import autocast
from tcore.files import InputError
from tcore.models.channels import channel_bounds, layers, norms_behind
from tcore.models.classifier import Classifier
from tcore.models.encoder import floats
from tcore.models.head import batches


@dataclass(frozen=True)
class Settings:
    untrusted_share: float = 0.1  # channels called untrusted, per layer, in [0, 1] [paper: App. A]
    rank: str = "masks"  # what chooses the channels, one of masks, random, lipschitz [paper: masks]
    stop_accuracy: float = 0.2  # unlearning ends below it, in [0, inf); keep above 1/classes [paper: App. A]
    unlearn_lr: float = 0.01  # SGD's rate, momentum 0.9, gradient norm clipped at 20, in [0, inf) [open; RNP]
    unlearn_epochs: int = 20  # unlearning ends here at the latest, in [0, inf) [open; RNP]
    window: int = 10  # batches over which unlearning watches its accuracy, in [1, inf) [open]
    epochs: int = 120  # recovery passes over the clean subset, in [1, inf) [paper: App. A]
    lr: float = 0.01  # Adam's rate in recovery, in (0, inf) [paper: App. A]
    batch: int = 128  # images a step, in [1, inf) [paper: Table 17]


RANKS = ("masks", "random", "lipschitz")
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def norm_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    found = [p for m in encoder.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)]
    if not found:
        raise InputError(
            "the encoder has no normalisation layers with scale and shift, which unlearning works on; "
            "T-Core needs batch, layer or group norm"
        )
    return found


def mask_output(layer: nn.Conv2d | nn.Linear, mask: Tensor) -> RemovableHandle:
    """From now on the layer computes with the weights m * w, its bias as it is."""
    shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)

    def scaled(layer: nn.Module, _, out: Tensor) -> Tensor:
        m = mask.to(out.dtype).view(shape)
        return out * m if layer.bias is None else out * m + (1 - m) * layer.bias.to(out.dtype).view(shape)

    return layer.register_forward_hook(scaled)


def unlearn(model: Classifier, images: Tensor, labels: Tensor, settings: Settings, seed: int) -> list[float]:
    """Ascends in place until `stop_accuracy`; the accuracy over each window of batches."""
    device = labels.device
    model.eval().requires_grad_(False)
    parameters = norm_parameters(model.encoder)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, settings.unlearn_lr, momentum=0.9, fused=True)
    generator = seeds.generator(seed, "filter", "unlearn")
    recent, trace = [], []
    for _ in trange(settings.unlearn_epochs, desc="unlearn", unit="epoch"):
        for rows in batches(len(labels), settings.batch, generator, device):
            with autocast(device):
                out = model(floats(images[rows]))
            loss = -F.cross_entropy(out.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 20)
            optimizer.step()
            recent.append((out.argmax(1) == labels[rows]).float().mean().item())
            if len(recent) >= settings.window:
                trace.append(round(sum(recent[-settings.window :]) / settings.window, 4))
                if trace[-1] < settings.stop_accuracy:
                    return trace
    return trace


def recover(
    model: Classifier, images: Tensor, labels: Tensor, settings: Settings, seed: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Masks (C_out,) by layer, averaged over the last sixth of the epochs, and accuracy per epoch."""
    device = labels.device
    model.eval().requires_grad_(False)
    found = layers(model.encoder)
    masks = {name: torch.ones(len(m.weight), device=device, requires_grad=True) for name, m in found.items()}
    handles = [mask_output(m, masks[name]) for name, m in found.items()]
    optimizer = torch.optim.Adam(masks.values(), settings.lr, fused=True)
    generator = seeds.generator(seed, "filter", "recover")
    last = max(1, settings.epochs // 6)
    mean = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    trace = []
    with trange(settings.epochs, desc="recover", unit="epoch") as bar:
        for epoch in bar:
            right = 0
            for rows in batches(len(labels), settings.batch, generator, device):
                with autocast(device):
                    out = model(floats(images[rows]))
                loss = F.cross_entropy(out.float(), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                bypassed = [name for name, mask in masks.items() if mask.grad is None]
                if bypassed:
                    raise InputError(
                        f"the encoder uses the weights of {bypassed[0]} without calling it, so its channels "
                        "cannot be masked; T-Core needs an encoder that calls its layers as modules"
                    )
                optimizer.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0, 1)
                right += (out.argmax(1) == labels[rows]).sum().item()
            trace.append(round(right / len(labels), 4))
            bar.set_postfix(accuracy=trace[-1])
            if epoch >= settings.epochs - last:
                for name, mask in masks.items():
                    mean[name] += mask.detach() / last
    for handle in handles:
        handle.remove()
    return mean, trace


@torch.no_grad()
def bounds(encoder: nn.Module) -> dict[str, Tensor]:
    """CLP's bound of each channel (C_out,) by layer."""
    norms, found = norms_behind(encoder), {}
    for name, layer in layers(encoder).items():
        if (norm := norms.get(name)) is None:
            found[name] = layer.weight.flatten(1).norm(dim=1)
        else:
            found[name] = channel_bounds(layer.weight, norm.weight, norm.running_var, norm.eps)
    return found


def filter_channels(
    model: Classifier, images: Tensor, labels: Tensor, subset: Tensor, settings: Settings, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Masks and untrusted channels (bool) by layer, and a log. `subset` (n,) bool; model untouched.

    uint8 images, on the device of the model.
    """
    if settings.rank not in RANKS:
        raise InputError(f"filter_channels.rank = {settings.rank!r} should be one of {RANKS}")
    log = {}
    if settings.rank == "masks":
        model = copy.deepcopy(model)
        log["unlearning_accuracy"] = unlearn(model, images, labels, settings, seed)
        masks, log["recovery_accuracy"] = recover(model, images[subset], labels[subset], settings, seed)
    elif settings.rank == "random":
        generator = seeds.generator(seed, "filter", "random")
        masks = {
            name: torch.rand(len(layer.weight), generator=generator).to(labels.device)
            for name, layer in layers(model.encoder).items()
        }
    else:
        masks = {name: -bound for name, bound in bounds(model.encoder).items()}
    untrusted = {}
    for name, mask in masks.items():
        lowest = mask.argsort(stable=True)[: int(settings.untrusted_share * len(mask))]
        untrusted[name] = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        untrusted[name][lowest] = True
    return masks, untrusted, log
