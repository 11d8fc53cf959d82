"""A network trained end to end, from random weights: what a frozen encoder with a head is compared with."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from tcore import seeds
from tcore.data.augment import flip
from tcore.data.images import ImageSet
from tcore.device import autocast
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder, floats
from tcore.models.head import batches


def train(
    images: ImageSet, architecture: str, epochs: int, batch: int, lr: float, seed: int, device
) -> Classifier:
    """An encoder with a linear head, both trained from scratch; flips are the only augmentation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "implantation", "weights"))
        encoder = Encoder(architecture, images.pixels.shape[1])
        model = Classifier(encoder, nn.Linear(encoder.dim, images.num_classes))
    model.to(device, memory_format=torch.channels_last).train()
    steps = epochs * (len(images) // batch + 1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    order = seeds.generator(seed, "implantation", "order")
    flips = seeds.generator(seed, "implantation", "flips", device=device.type)
    pixels, labels = images.tensor.to(device), images.targets.to(device)
    for _ in trange(epochs, desc="training", unit="epoch", leave=False):
        for rows in batches(len(images), batch, order, device):
            with autocast(device):
                loss = F.cross_entropy(model(flip(floats(pixels[rows]), flips)).float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
