"""Does each detector work where its own paper says it does?

Trains a network end to end on images with a strong BadNets or Blended poisoning (or on clean ones), lets
every detector judge the training set, and writes a table: share of poisons found, false alarms, AUROC,
poisons among the cleanest 1 % of each class, seconds; of input detectors also the AUROC on test images.
Methods that train train whole networks from random weights, as in their papers. Settings that differ from
the defaults stand in SETTINGS.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import trange

from tcore import device as devices
from tcore import seeds
from tcore.data.augment import flip, resized_crop
from tcore.data.images import ImageSet
from tcore.defenses import _interface as defense
from tcore.defenses import _selection as selection
from tcore.device import autocast
from tcore.evaluation import metrics, results
from tcore.experiment import registry
from tcore.files import load_table, save_table
from tcore.models import head as heads
from tcore.models.classifier import Classifier, load_classifier, logits, save_classifier
from tcore.models.encoder import Encoder, extract_features, floats
from tcore.poisoning.poisoned import Poisoned, choose
from tcore.running.cli import run

HEAD = heads.Settings(hidden=(128, 64), dropout=0.0, normalize=False, lr=1e-3, epochs=20)
# A tenth of the images and a narrow network: the same kinds of training with fewer steps and larger ones.
SETTINGS = {
    "strip": {"overlays": 24},
    "ct": {
        "ratios": [0.2, 0.04],
        "epochs": [8, 10, 20],
        "steps": [300, 300, 300],
        "weights": [20.0, 20.0, 15.0],
        "confusion_lr": [1e-2, 1e-2, 1e-2],
        "batch": 64,
    },
    "asset": {"epochs": 6, "lr": 1e-3, "inner_lr": 1e-3, "batch": 256},
    "meta_sift": {"sifters": 2, "lr": 1e-3, "v_lr": 0.05},
}


def tuples(settings: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def new_encoder(size: int, seed: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "study", "weights"))
        return Encoder("resnet_narrow", size)


def train(images: ImageSet, epochs: int, seed: int, device: torch.device) -> Classifier:
    """The suspect: Adam, cosine to 0, small crops and flips."""
    encoder = new_encoder(images.tensor.shape[-1], seed)
    head = heads.new_head(encoder.dim, images.num_classes, HEAD, seed, "study", "head")
    model = Classifier(encoder, head).to(device, memory_format=torch.channels_last)
    pixels, labels = images.tensor.to(device), images.targets.to(device)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    order = seeds.generator(seed, "study", "order")
    views = seeds.generator(seed, "study", "views", device=device.type)
    total, step = epochs * math.ceil(len(labels) / 128), 0
    model.train()
    for _ in trange(epochs, desc="suspect", unit="epoch"):
        for rows in heads.batches(len(labels), 128, order, device):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / total))
            x = flip(resized_crop(floats(pixels[rows]), views, (0.8, 1.0)), views)
            with autocast(device):
                out = model(x)
            loss = F.cross_entropy(out.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    return model.eval()


def granted(poisoned: Poisoned, share: float, seed: int) -> np.ndarray:
    """A share of each class's untouched samples, (n,) bool."""
    labels, found = poisoned.truth["clean_label"].to_numpy(), np.zeros(len(poisoned.truth), bool)
    untouched = ~(poisoned.truth["is_poison"] | poisoned.truth["is_cover"]).to_numpy(bool)
    for k in np.unique(labels):
        eligible = untouched & (labels == k)
        found[choose(eligible, round(share * eligible.sum()), seed, "granted", int(k))] = True
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="parquet", help="a file name in tcore/data/sources")
    parser.add_argument("--source-settings", type=json.loads, required=True, help="JSON")
    parser.add_argument("--attack", required=True, help="a file name in tcore/dataset_attacks")
    parser.add_argument("--attack-settings", type=json.loads, default={}, help="JSON")
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20, help="of the suspect")
    parser.add_argument("--detectors", nargs="*", help="default: all; none for the suspect alone")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, of all detectors named")
    parser.add_argument("--trusted", type=float, default=0.1, help="share of each class that is known clean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="the suspects are kept here")
    parser.add_argument("--table", type=Path, required=True, help="Parquet; a row per detector is appended")
    args = parser.parse_args()

    device, seed = devices.pick(), args.seed
    source = registry.load("data/sources", args.source)
    images = source.load(source.Settings(**args.source_settings), {})
    attack = registry.load("dataset_attacks", args.attack)
    poisoned = attack.poison(images["train"], args.target, attack.Settings(**args.attack_settings), seed)
    is_poison = poisoned.truth["is_poison"].to_numpy(bool)

    path = args.folder / f"{args.attack}-{seed}.safetensors"
    if not path.exists():
        save_classifier(
            path, train(poisoned.images, args.epochs, seed, device).cpu(), images["train"].class_names
        )
    suspect = load_classifier(path).to(device)
    test = images["test"]
    row = {"attack": args.attack, "seed": seed, "poisons": int(is_poison.sum())}
    row["acc"] = metrics.accuracy(logits(suspect, test.tensor).argmax(1).cpu().numpy(), test.labels).value
    if is_poison.any():
        found = logits(suspect, attack.stamp(test.tensor, poisoned.trigger)).argmax(1).cpu().numpy()
        row["asr"] = metrics.attack_success_rate(found, test.labels, args.target).value
    print(json.dumps(row))

    clean = granted(poisoned, args.trusted, seed)
    pixels = poisoned.images.tensor.to(device)
    received = defense.Received(
        model=suspect,
        images=pixels,
        labels=poisoned.images.targets.to(device),
        features=extract_features(suspect.encoder, pixels),
        classes=poisoned.images.num_classes,
        clean=torch.from_numpy(clean).to(device),
        head=HEAD,
        part="all",
        encoder=new_encoder(pixels.shape[-1], seed + 1).to(device),
    )
    names = registry.names("defenses") if args.detectors is None else args.detectors
    for name in names:
        method = registry.load("defenses", name)
        if method.KIND != "detector":
            continue
        given = SETTINGS.get(name, {}) | args.settings
        oracle = {"poison_rate": float(is_poison.mean())} if method.ORACLE and is_poison.any() else {}
        settings = method.Settings(**tuples(given | oracle))
        start, cpu = time.perf_counter(), time.process_time()
        score, kept = defense.detect(method, received, settings, selection.Settings(), seed)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        table = pd.DataFrame(
            {
                "index": poisoned.images.index,
                "label": poisoned.images.labels,
                "score": score.double().cpu().numpy(),
                "kept": kept.cpu().numpy(),
                "trusted": clean & method.CLEAN,
            }
        )
        judged = {
            f"{r['stage']}_{r['metric']}": r["value"] for r in results.detector_rows(poisoned.truth, table)
        }
        wanted = ("detect_tpr", "detect_fpr", "detect_auroc", "cleanest_poisons", "cleanest_size")
        line = (
            row | {"detector": name, "settings": json.dumps(given | oracle)} | {k: judged[k] for k in wanted}
        )
        line |= {"seconds": seconds, "cpu_seconds": cpu}
        if is_poison.any() and hasattr(method, "score_inputs"):  # of later use: clean and triggered images
            others = test.tensor[test.labels != args.target]
            views = [test.tensor, attack.stamp(others, poisoned.trigger)]
            scores = [method.score_inputs(view.to(device), received, settings, seed).cpu() for view in views]
            triggered = np.repeat([False, True], [len(view) for view in views])
            line["inputs_auroc"] = metrics.auroc(torch.cat(scores).double().numpy(), triggered)
        print(json.dumps(line))
        lines = pd.DataFrame([line])
        save_table(
            args.table,
            pd.concat([load_table(args.table), lines], ignore_index=True) if args.table.exists() else lines,
        )


if __name__ == "__main__":
    run(main)
