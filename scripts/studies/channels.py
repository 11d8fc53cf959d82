"""Do the channels that filtering distrusts carry the backdoor? Table 7's protocol: prune them, train a head.

Reads a cell with a backdoored encoder that a run has left in its data folder, as the evaluator. For each
setting of filter_channels the untrusted channels of the encoder are set to zero, a head is trained on the
clean labelled images, and tested with the encoder's trigger. `recovered` is the accuracy of the masked
network on the clean subset, which a defender sees too.
"""

import argparse
import copy
import json
from pathlib import Path

import pandas as pd
import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.evaluation import metrics
from tcore.experiment import grid
from tcore.experiment.settings import resolve
from tcore.files import atomic, load_table
from tcore.models import head as heads
from tcore.models.channels import layers, norms_behind
from tcore.models.classifier import load_classifier
from tcore.models.encoder import Encoder, extract_features
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.stages import filter_channels


def prune(encoder: Encoder, untrusted: dict[str, torch.Tensor]) -> Encoder:
    """A copy whose untrusted channels give zero."""
    encoder = copy.deepcopy(encoder)
    norms = norms_behind(encoder)
    with torch.no_grad():
        for name, layer in layers(encoder).items():
            for part in filter(None, (layer, norms.get(name))):
                part.weight[untrusted[name]] = 0
                if part.bias is not None:
                    part.bias[untrusted[name]] = 0
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cell", required=True, help="<pretrain>-<attack>/<downstream>-<attack>/<seed>")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="JSON: {name: settings of filter_channels}"
    )
    parser.add_argument("--head", type=json.loads, default={}, help="JSON: settings of the head")
    parser.add_argument("--output", required=True, type=Path, help="out: CSV")
    args = parser.parse_args()

    device, rows = devices.pick(), []
    head = heads.Settings(**resolve("head", args.head, "--head"))
    victim = grid.victim(args.cell)
    folder, received = args.data / "defended" / args.cell, args.data / grid.received(**victim)
    images = read_images(received / "train.parquet")
    test = read_images(args.data / "datasets" / victim["downstream"] / "test.parquet")
    attacked = "encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors".format(**victim)
    stamp, meta = triggers.load(args.data / attacked)
    seed = int(victim["seed"])
    model = load_classifier(folder / "none/model.safetensors").to(device)
    subset = torch.from_numpy((load_table(folder / "tcore/subset.parquet")["round"] >= 0).to_numpy(copy=True))
    clean = torch.from_numpy(~load_table(received / "truth.parquet")["is_poison"].to_numpy())
    pixels, labels = images.tensor.to(device), images.targets.to(device)
    for name, given in args.settings.items():
        settings = filter_channels.Settings(**resolve("filter_channels", given, f"--settings {name}"))
        _, untrusted, log = filter_channels.filter_channels(
            model, pixels, labels, subset.to(device), settings, seed
        )
        pruned = prune(model.encoder, untrusted)
        fresh = heads.new_head(pruned.dim, images.num_classes, head, seed, "study")
        features = extract_features(pruned, images.tensor[clean])
        heads.fit_head(fresh, features, labels[clean], head.epochs, seed, "study")
        says = {
            view: fresh(extract_features(pruned, shown)).argmax(1).cpu().numpy()
            for view, shown in (("clean", test.tensor), ("triggered", stamp(test.tensor)))
        }
        rows.append(
            {
                "settings": name,
                "recovered": log.get("recovery_accuracy", [float("nan")])[-1],
                "acc": metrics.accuracy(says["clean"], test.labels).value,
                "asr": metrics.attack_success_rate(says["triggered"], test.labels, meta["target"]).value,
            }
        )
        print(rows[-1], flush=True)
    with atomic(args.output) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


if __name__ == "__main__":
    run(main)
