"""CBD: a clean model learnt against one that is backdoored on purpose; needs no clean data.

Zhang, Liu, Wang, Lu, Hu: Backdoor Defense via Deconfounded Representation Learning, CVPR 2023. Assumes
that poisons are learnt in the first epochs. A network f_b, trained for these only and then fixed, stands for
the backdoor; a new network f_c is trained on samples weighted by what f_b does not explain:

    w   = l_b / (l_b + l_c + 1e-8), scaled to mean 1 over the batch     l = cross-entropy, without gradient
    L_c = mean(w CE(f_c)) + mi I(r; z)
    I   = E T(r, z) - E T(r, z')            z' = z with its rows shuffled

with r, z the penultimate features of f_b, f_c (N, d) and T a critic (linear, relu, dropout 0.2, linear)
that maximises I over one pass per epoch; after every step each of its parameters is divided by its
spectral norm.

What is trained is `received.part`: two heads on cached features (frozen encoder), or two networks. The
latter start from the encoder received; the paper starts from random weights. r and z are the head's second
layer: encoder outputs would be identical for f_b and f_c when the encoder is frozen. Where poisons are not
learnt first, as with a frozen clean encoder, the weights favour whatever is hard.

Deviations from the released code: the rate of f_b is not scheduled along with that of f_c; with mi = 0 (the
code's default; the paper's method has 0.01) there is no critic at all.

Cost: without the critic `backdoor_epochs` + `epochs` training passes, and `epochs` forward passes of f_b.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.defenses import _training as training
from tcore.defenses._interface import Received
from tcore.device import autocast
from tcore.models.classifier import Classifier

KIND = "model"
CLEAN = False
NEEDS_NORM = False
ORACLE = ()
TRAINS = True


@dataclass(frozen=True)
class Settings:
    backdoor_epochs: int = 5  # passes of f_b, in [1, inf) [released code]
    epochs: int = 100  # passes of f_c, in [1, inf); rate / 10 after 0.2 and 0.7 of them [released code]
    lr: float = 0.1  # SGD's rate at its peak, Nesterov momentum 0.9, in (0, inf) [released code]
    weight_decay: float = 1e-4  # of SGD, in [0, inf) [released code]
    batch: int = 64  # samples a step, in [1, inf) [released code]
    mi: float = 0.0  # weight of I(r; z), in [0, inf); 0: no critic [released code; paper: 0.01]
    critic_lr: float = 0.2  # Adam's rate for the critic, / 10 every 20 epochs, in (0, inf) [released code]
    shift: float = 0.125  # random shift of images, as a share of their side, in [0, 1] [released code]
    flip: bool = True  # whether images are mirrored by chance [released code]


def weights(loss_b: Tensor, loss_c: Tensor) -> Tensor:
    """w of the formula (N,)."""
    w = loss_b / (loss_b + loss_c + 1e-8)
    return w / w.mean().clamp(min=1e-8)


def information(critic: nn.Module, r: Tensor, z: Tensor, shuffle: Tensor) -> Tensor:
    """I of the formula, a scalar; `shuffle` is a permutation of the rows."""
    joint, product = torch.cat([r, z], 1), torch.cat([r, z[shuffle]], 1)
    return critic(joint).mean() - critic(product).mean()


def new_critic(dim: int, device: torch.device) -> nn.Module:
    return nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Dropout(0.2), nn.Linear(dim, 1)).to(device)


@torch.no_grad()
def divide_by_spectral_norm(critic: nn.Module) -> None:
    """In place; the norm of a bias is its Euclidean norm."""
    for p in critic.parameters():
        w = p.view(len(p), -1)
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w  # its eigenvalues are faster than an SVD
        p /= torch.linalg.eigvalsh(gram)[-1].clamp(min=1e-24).sqrt()


def repair(received: Received, settings: Settings, seed: int) -> tuple[Classifier, dict]:
    """The classifier of f_c; the log has the mean losses of f_b and, by epoch, of f_c and I(r; z)."""
    device, samples = received.device, (received.inputs, received.labels)
    generator = seeds.generator(seed, "cbd", "order")

    def network_and_optimizer(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        network = received.network(seed, "cbd", name)
        optimizer = torch.optim.SGD(
            network.parameters(),
            settings.lr,
            0.9,
            weight_decay=settings.weight_decay,
            nesterov=True,
            fused=True,
        )
        return network.train(), optimizer

    def passes():
        return training.passes(*samples, settings, 1, generator)

    def activations(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device):
            _, penultimate, logits = network.activations(x)
        return penultimate.float(), logits.float()

    def permutation(x: Tensor) -> Tensor:
        return torch.randperm(len(x), generator=generator).to(device)

    with training.stream(device, seed, "cbd", "dropout"):
        backdoored, optimizer = network_and_optimizer("backdoored")
        for _ in trange(settings.backdoor_epochs, desc="CBD: backdoored", unit="epoch"):
            for _, x, y in passes():
                training.descend(optimizer, F.cross_entropy(activations(backdoored, x)[1], y))
        backdoored.eval().requires_grad_(False)

        clean, optimizer = network_and_optimizer("clean")
        critic = new_critic(received.head.hidden[1], device)
        critic_optimizer = torch.optim.Adam(critic.parameters(), settings.critic_lr)
        log = {"loss_backdoored": [], "loss": [], "information": []}
        for epoch in trange(settings.epochs, desc="CBD: clean", unit="epoch"):
            progress = epoch / settings.epochs
            lr = settings.lr * (1 if progress < 0.2 else 0.1 if progress < 0.7 else 0.01)
            if settings.mi:
                for _, x, _ in passes():
                    with torch.no_grad():
                        r, z = activations(backdoored, x)[0], activations(clean, x)[0]
                    gained = information(critic, r, z, permutation(x))
                    training.descend(critic_optimizer, -gained, settings.critic_lr * 0.1 ** (epoch // 20))
                    divide_by_spectral_norm(critic)
            sums, steps = torch.zeros(3, device=device), 0
            for _, x, y in passes():
                with torch.no_grad():
                    r, out = activations(backdoored, x)
                    loss_b = F.cross_entropy(out, y, reduction="none")
                z, out = activations(clean, x)
                loss_c = F.cross_entropy(out, y, reduction="none")
                loss = (weights(loss_b, loss_c.detach()) * loss_c).mean()
                gained = information(critic, r, z, permutation(x)) if settings.mi else loss.new_zeros(())
                training.descend(optimizer, loss + settings.mi * gained, lr)
                sums += torch.stack([loss_b.mean(), loss_c.mean(), gained]).detach()
                steps += 1
            for name, value in zip(log, (sums / steps).tolist(), strict=True):
                log[name].append(round(value, 4))
    return training.assembled(received, clean).eval(), log
