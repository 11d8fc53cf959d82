"""Encoder Channel Filtering: the channels that cannot be trusted (paper: 4.2, Alg. 3).

(a) Unlearning: gradient ascent of CE over all of D, on the scales and shifts of the
    normalisation layers only, until training accuracy falls below `stop_accuracy`.
    The result is theta_hat.
(b) Recovery: masks m in [0, 1], one per output channel of each convolution, start at 1 and
    descend CE over the clean subset through m * theta_hat (eq. 5), clipped after each step.
(c) In each convolution the floor(share C_out) channels with the smallest mask are untrusted.

The head is the suspect one and stays frozen. Batch norm uses its stored statistics
throughout: in training mode a mask in front of it would have no gradient. The masks ranked
are means over the last sixth of the epochs, which breaks ties at 0 and 1.
Not in the paper: optimiser, rate, clipping and check interval of (a), taken from RNP
(Li et al., ICML 2023); a mask scales the convolution's output, the same as its weights,
since these convolutions have no bias.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.device import autocast
from tcore.models.classifier import Classifier
from tcore.models.encoder import floats
from tcore.models.head import batches


@dataclass(frozen=True)
class Settings:
    untrusted_share: float = 0.1  # channels called untrusted, per layer [paper: App. A]
    stop_accuracy: float = 0.2  # unlearning ends below this accuracy; keep above 1/classes [paper: App. A]
    unlearn_lr: float = 0.01  # SGD's rate, momentum 0.9, gradient norm clipped at 20 [open; RNP]
    unlearn_epochs: int = 20  # unlearning ends here at the latest [open; RNP]
    window: int = 10  # batches over which unlearning watches its accuracy [open]
    epochs: int = 120  # recovery passes over the clean subset [paper: App. A]
    lr: float = 0.01  # Adam's rate in recovery [paper: App. A]
    batch: int = 128  # images a step [paper: Table 17]


def convolutions(encoder: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}


def norm_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    return [p for m in encoder.modules() if isinstance(m, nn.BatchNorm2d) for p in (m.weight, m.bias)]


def unlearn(model: Classifier, images: Tensor, labels: Tensor, settings: Settings, seed: int) -> list[float]:
    """Ascends in place until `stop_accuracy`; the accuracy over each window of batches."""
    device = labels.device
    model.eval().requires_grad_(False)
    parameters = norm_parameters(model.encoder)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, settings.unlearn_lr, momentum=0.9)
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
    """Masks (C_out,) by convolution, averaged over the last sixth of the epochs, and accuracy per epoch."""
    device = labels.device
    model.eval().requires_grad_(False)
    layers = convolutions(model.encoder)
    masks = {
        name: torch.ones(m.out_channels, device=device, requires_grad=True) for name, m in layers.items()
    }
    handles = [
        m.register_forward_hook(lambda _, __, out, mask=masks[name]: out * mask.view(-1, 1, 1))
        for name, m in layers.items()
    ]
    optimizer = torch.optim.Adam(masks.values(), settings.lr)
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


def filter_channels(
    model: Classifier, images: Tensor, labels: Tensor, subset: Tensor, settings: Settings, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Masks and untrusted channels (bool) by convolution, and a log. `subset` (n,) bool; model untouched.

    uint8 images, on the device of the model.
    """
    model = copy.deepcopy(model)
    log = {"unlearning_accuracy": unlearn(model, images, labels, settings, seed)}
    masks, log["recovery_accuracy"] = recover(model, images[subset], labels[subset], settings, seed)
    untrusted = {}
    for name, mask in masks.items():
        lowest = mask.argsort(stable=True)[: int(settings.untrusted_share * len(mask))]
        untrusted[name] = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        untrusted[name][lowest] = True
    return masks, untrusted, log
