"""The downstream classifier: three linear layers on features of the encoder.

    h1 = relu(fc1 norm(z)),  h2 = relu(fc2 dropout(h1)),  logits = fc3 h2

with norm the L2 normalisation of features. The paper says "three linear layers"; widths
and the training recipe are those of BadEncoder's downstream classifier (Jia et al., S&P
2022), whose published results agree with the paper's undefended rows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds


@dataclass(frozen=True)
class Settings:
    hidden: tuple[int, int] = (512, 256)  # widths of the first two layers, in [1, inf) [BadEncoder]
    dropout: float = 0.5  # after the first layer, in training, in [0, 1] [BadEncoder]
    normalize: bool = True  # L2-normalise features before the head [BadEncoder]
    lr: float = 1e-4  # Adam's rate, in (0, inf) [BadEncoder]
    batch: int = 64  # images a step, in [1, inf) [BadEncoder]
    epochs: int = 500  # passes over the cached features, in [1, inf) [BadEncoder]


class Head(nn.Module):
    """Features (N, d) -> logits (N, C). `activations` gives (h1, h2, logits)."""

    def __init__(self, dim: int, classes: int, settings: Settings):
        super().__init__()
        first, second = settings.hidden
        self.fc1 = nn.Linear(dim, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, classes)
        self.settings = settings
        self.dim, self.classes = dim, classes

    def activations(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(features, dim=1) if self.settings.normalize else features
        h1 = torch.relu(self.fc1(z))
        h2 = torch.relu(self.fc2(self.dropped(h1) if self.training else h1))
        return h1, h2, self.fc3(h2)

    def dropped(self, h1: Tensor) -> Tensor:
        """Dropout; on a CPU from random bytes, which is four times as fast as drawing numbers, with a rate in
        steps of 1/256."""
        kept = 256 - round(256 * self.settings.dropout)
        if h1.device.type != "cpu" or kept in (0, 256):
            return F.dropout(h1, self.settings.dropout)
        words = torch.empty(-(-h1.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = words.view(torch.uint8)[: h1.numel()].view(h1.shape) < kept
        return h1 * mask * (256 / kept)

    def forward(self, features: Tensor) -> Tensor:
        return self.activations(features)[2]

    def description(self) -> dict:
        return {"dim": self.dim, "classes": self.classes, "settings": asdict(self.settings)}


def new_head(dim: int, classes: int, settings: Settings, seed: int, *names: str) -> Head:
    """A freshly initialised head from the stream `names`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, *names))
        return Head(dim, classes, settings)


def batches(n: int, size: int, generator: torch.Generator, device: torch.device):
    """Index batches of one shuffled pass over n rows; a last batch of one row is left out."""
    for rows in torch.randperm(n, generator=generator).split(size):
        if len(rows) > 1 or n == 1:
            yield rows.to(device)


def fit_head(
    head: Head,
    features: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int,
    *names: str,
    bar: bool = True,
    watch: Callable[[Head], None] | None = None,
) -> Head:
    """Trains `head` in place by cross-entropy on cached features (n, d); eval mode after.

    `watch` is shown the head, in eval mode, after every pass.
    """
    settings, device = head.settings, features.device
    head.to(device).train()
    optimizer = torch.optim.Adam(head.parameters(), settings.lr, fused=True)
    generator = seeds.generator(seed, *names, "order")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, *names, "dropout"))
        for _ in trange(epochs, desc="head", unit="epoch", disable=not bar):
            for rows in batches(len(features), settings.batch, generator, device):
                loss = F.cross_entropy(head(features[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if watch:
                watch(head.eval())
                head.train()
    return head.eval()
