"""Does each model-producing defence work where its own paper says it does?

Trains a network end to end on images with a strong BadNets or Blended poisoning, lets one defence train or
repair, and appends a row with accuracy and attack success before and after to a table. As in the papers,
ABL and CBD train from random weights, and FT-SAM and I-BAU repair the whole network. SSL-Distillation
gets the poisoned encoder and an honest data set, so what it undoes is the encoder's backdoor alone.
"""

import argparse
import copy
import json
import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from tcore import device as devices
from tcore import seeds
from tcore.data.images import ImageSet
from tcore.defenses import _interface as defense
from tcore.defenses import _training as training
from tcore.evaluation import metrics
from tcore.experiment import registry
from tcore.files import load_table, save_table
from tcore.models import head as heads
from tcore.models.classifier import Classifier, load_classifier, logits, save_classifier
from tcore.models.encoder import Encoder, extract_features
from tcore.poisoning.poisoned import choose
from tcore.running.cli import run

HEAD = heads.Settings(hidden=(128, 64), dropout=0.0, normalize=False, lr=1e-3, epochs=30)


@dataclass(frozen=True)
class Recipe:
    """How the undefended network is trained: SGD, Nesterov momentum, one cosine to 0."""

    epochs: int = 30
    batch: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    shift: float = 0.125
    flip: bool = True


def new_classifier(images: ImageSet, seed: int, device: torch.device) -> Classifier:
    with training.stream(torch.device("cpu"), seed, "study", "weights"):
        encoder = Encoder("resnet_narrow", images.tensor.shape[-1])
    head = heads.new_head(encoder.dim, images.num_classes, HEAD, seed, "study", "head")
    return Classifier(encoder, head).to(device, memory_format=torch.channels_last)


def end_to_end(images: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> Classifier:
    """The undefended classifier, trained on everything."""
    model = new_classifier(images, seed, device).train()
    network = defense.Whole(model)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, 0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    generator = seeds.generator(seed, "study", "order")
    samples = (images.tensor.to(device), images.targets.to(device))
    with training.stream(device, seed, "study", "dropout"):
        for progress, x, y in training.passes(*samples, recipe, recipe.epochs, generator):
            rate = recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))
            training.descend(optimizer, F.cross_entropy(network(x), y), rate)
    return model.eval()


def measured(model: Classifier, test: ImageSet, triggered: torch.Tensor, target: int) -> dict[str, float]:
    predictions = [logits(model, x).argmax(1).cpu().numpy() for x in (test.tensor, triggered)]
    return {
        "acc": metrics.accuracy(predictions[0], test.labels).value,
        "asr": metrics.attack_success_rate(predictions[1], test.labels, target).value,
        "robust": metrics.robust_accuracy(predictions[1], test.labels, target).value,
    }


def trusted(truth: pd.DataFrame, share: float, seed: int) -> np.ndarray:
    """A share of each class's untouched samples, (n,) bool."""
    labels, chosen = truth["clean_label"].to_numpy(), np.zeros(len(truth), bool)
    untouched = ~(truth["is_poison"] | truth["is_cover"]).to_numpy(bool)
    for k in np.unique(labels):
        eligible = untouched & (labels == k)
        chosen[choose(eligible, round(share * eligible.sum()), seed, "study", int(k))] = True
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="parquet", help="a file name in tcore/data/sources")
    parser.add_argument("--source-settings", type=json.loads, required=True, help="JSON")
    parser.add_argument("--attack", required=True, help="a file name in tcore/dataset_attacks")
    parser.add_argument("--attack-settings", type=json.loads, default={}, help="JSON")
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON, how the network is trained")
    parser.add_argument("--defense", help="a file name in tcore/defenses; without it the network alone")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, the defence's settings")
    parser.add_argument("--trusted", type=float, default=0.1, help="share of clean samples for those in need")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="networks are kept here")
    parser.add_argument("--table", type=Path, required=True, help="Parquet, one row per run is appended")
    args = parser.parse_args()

    device, seed = devices.pick(), args.seed
    source = registry.load("data/sources", args.source)
    images = source.load(source.Settings(**args.source_settings), {})
    attack = registry.load("dataset_attacks", args.attack)
    poisoned = attack.poison(images["train"], args.target, attack.Settings(**args.attack_settings), seed)
    triggered = attack.stamp(images["test"].tensor, poisoned.trigger)
    recipe = Recipe(**args.recipe)

    path = args.folder / f"{args.attack}-{seed}.safetensors"
    if not path.exists():
        model = end_to_end(poisoned.images, recipe, seed, device)
        save_classifier(path, model.cpu(), images["train"].class_names)
    suspect = load_classifier(path).to(device)

    received = defense.Received(
        model=suspect,
        images=poisoned.images.tensor.to(device),
        labels=poisoned.images.targets.to(device),
        features=extract_features(suspect.encoder, poisoned.images.tensor),
        classes=poisoned.images.num_classes,
        clean=torch.from_numpy(trusted(poisoned.truth, args.trusted, seed)).to(device),
        head=HEAD,
        part="all",
        encoder=new_classifier(images["train"], seed + 1, device).encoder,
    )
    if args.defense == "ssl_distillation":
        honest = images["train"]
        features = extract_features(suspect.encoder, honest.tensor)
        received = replace(
            received, images=honest.tensor.to(device), labels=honest.targets.to(device), features=features
        )
        suspect = defense.retrain(received, torch.ones_like(received.labels, dtype=torch.bool), seed)

    row = {"attack": args.attack, "defense": args.defense or "none", "settings": json.dumps(args.settings)}
    row |= {"seed": seed, "trusted": int(received.clean.sum())}
    row |= {f"{k}_before": v for k, v in measured(suspect, images["test"], triggered, args.target).items()}
    if args.defense:
        method = registry.load("defenses", args.defense)
        start, ram = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model, log = defense.repair(method, copy.copy(received), method.Settings(**args.settings), seed)
        row["seconds"] = time.perf_counter() - start
        row["ram_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - ram) / 1024
        row |= {f"{k}_after": v for k, v in measured(model, images["test"], triggered, args.target).items()}
        if args.defense == "abl":
            poisons = poisoned.truth["is_poison"].to_numpy(bool)
            row["isolated"], row["isolated_poisons"] = len(log["isolated"]), poisons[log["isolated"]].sum()
        row["log"] = json.dumps({k: v for k, v in log.items() if k != "isolated"})
    print(json.dumps(row, indent=1, default=float))
    table = pd.DataFrame([row])
    if args.table.exists():
        table = pd.concat([load_table(args.table), table], ignore_index=True)
    save_table(args.table, table)


if __name__ == "__main__":
    run(main)
