"""How many poisons does expansion let in, with one setting or another? A row per cell and setting.

Reads cells that a run has left in its data folder, as the evaluator: T-Core's seeds, the features and the
truth. Poisons count in the clean subset, of the samples that carry the target's label there; `known` is the
accuracy that the last confusion left on the trusted samples.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.experiment import grid
from tcore.experiment.settings import resolve
from tcore.files import atomic, load_table, load_tensors
from tcore.models import head as heads
from tcore.running.cli import run
from tcore.stages import expand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--cells", nargs="+", required=True, help="<pretrain>-<attack>/<downstream>-<attack>/<seed>"
    )
    parser.add_argument("--settings", type=json.loads, required=True, help="JSON: {name: settings of expand}")
    parser.add_argument("--head", type=json.loads, default={}, help="JSON: settings of the head")
    parser.add_argument("--output", required=True, type=Path, help="out: CSV")
    args = parser.parse_args()

    device, rows = devices.pick(), []
    head = heads.Settings(**resolve("head", args.head, "--head"))
    choices = {
        name: expand.Settings(**resolve("expand", given, f"--settings {name}"))
        for name, given in args.settings.items()
    }
    for cell in args.cells:
        victim = grid.victim(cell)
        folder, received = args.data / "defended" / cell, args.data / grid.received(**victim)
        images = read_images(received / "train.parquet")
        features = load_tensors(folder / "features.safetensors")[0]["features"].to(device)
        sifted = load_table(folder / "tcore" / "seeds.parquet")
        seeds, core = (sifted[name].to_numpy(copy=True) for name in ("trusted", "in_core"))
        poison = load_table(received / "truth.parquet")["is_poison"].to_numpy()
        target = images.labels[poison][0]
        for name, settings in choices.items():
            rounds, log = expand.expand(
                features,
                images.targets.to(device),
                torch.from_numpy(seeds).to(device),
                torch.from_numpy(core).to(device),
                images.num_classes,
                settings,
                head,
                int(victim["seed"]),
            )
            chosen = rounds.cpu().numpy() >= 0
            rows.append(
                {
                    "cell": cell,
                    "settings": name,
                    "seeds": int((seeds & poison).sum()),
                    "poisons": int((chosen & poison).sum()),
                    "of_target": int((chosen & (images.labels == target)).sum()),
                    "known": (log["trusted_accuracy"] or [float("nan")])[-1],
                }
            )
            print(rows[-1], flush=True)
    with atomic(args.output) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


if __name__ == "__main__":
    run(main)
