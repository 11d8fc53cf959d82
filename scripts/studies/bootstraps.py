"""Does a change of bootstrapping change what gets through? Paired runs from the states that a run has left.

For every cell with T-Core in the data folder and each of the random seeds, bootstrapping runs once with each
variant, a change of its settings, and in each arithmetic, from the same encoder, seed samples, clean subset
and channels. The evaluator's measures go into one CSV; what stands there already is not run again, so that
several of these commands, with different seeds, can share a machine and go on where they stopped.
"""

import argparse
import json
import os
import time
from pathlib import Path

import pandas as pd
import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.evaluation import metrics
from tcore.experiment import grid
from tcore.files import atomic, load_json, load_table, load_tensors
from tcore.models import head as heads
from tcore.models.classifier import load_classifier, logits
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.stages import bootstrap


def measure(data: Path, cell: str, seed: int, changes: dict, device: torch.device) -> dict:
    """ACC and ASRs in percent, poisons in the pool, and seconds of one bootstrapping."""
    victim = grid.victim(cell)
    folder, received = data / "defended" / cell, data / grid.received(**victim)
    images, test = read_images(received / "train.parquet"), data / "datasets" / victim["downstream"]
    test = read_images(test / "test.parquet")
    given = load_json(folder / "tcore/bootstrap.run.json")["settings"]
    channels = load_tensors(folder / "tcore/channels.safetensors")[0].items()
    untrusted = {
        name.removeprefix("untrusted."): c.to(device) for name, c in channels if "untrusted." in name
    }
    subset = torch.from_numpy((load_table(folder / "tcore/subset.parquet")["round"] >= 0).to_numpy(copy=True))
    core = torch.from_numpy(load_table(folder / "tcore/seeds.parquet")["in_core"].to_numpy(copy=True))
    start = time.perf_counter()
    model, pool, _ = bootstrap.bootstrap(
        load_classifier(folder / "none/model.safetensors").to(device).encoder,
        images.tensor.to(device),
        images.targets.to(device),
        images.num_classes,
        subset.to(device),
        core.to(device),
        untrusted,
        bootstrap.Settings(**given["bootstrap"] | changes),
        heads.Settings(**given["head"]),
        seed,
    )
    seconds = time.perf_counter() - start
    attack = "encoders/{pretrain}-{encoder_attack}/{downstream}/{seed}/trigger.safetensors".format(**victim)
    found = {"acc": metrics.accuracy(logits(model, test.tensor).argmax(1).cpu().numpy(), test.labels).value}
    for name, path in (("encoder", data / attack), ("dataset", received / "trigger.safetensors")):
        stamp, meta = triggers.load(path) if path.is_file() else (None, {})
        if stamp is not None:
            says = logits(model, stamp(test.tensor)).argmax(1).cpu().numpy()
            found[f"asr_{name}"] = metrics.attack_success_rate(says, test.labels, meta["target"]).value
    percent = {name: round(100 * value, 2) for name, value in found.items()}
    poison = load_table(received / "truth.parquet")["is_poison"].to_numpy()
    joined = int((poison & (pool["round"] >= 0).to_numpy()).sum())
    return percent | {"poisons_in_pool": joined, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of bootstrapping alone")
    parser.add_argument("--variants", type=json.loads, default={"as it is": {}}, help="JSON: {name: changes}")
    parser.add_argument("--precisions", nargs="+", default=["auto"], help="auto, float32 or both")
    parser.add_argument("--output", required=True, type=Path, help="CSV, of this command alone; goes on")
    args = parser.parse_args()

    device = devices.pick()
    states = sorted(args.data.glob("defended/*/*/*/tcore/bootstrap.run.json"))
    rows = pd.read_csv(args.output).to_dict("records") if args.output.exists() else []
    done = {(row["cell"], row["seed"], row["variant"], row["precision"]) for row in rows}
    for seed in args.seeds:
        for cell in ("/".join(state.parts[-5:-2]) for state in states):
            for name, changes in args.variants.items():
                for precision in args.precisions:
                    if (cell, seed, name, precision) in done:
                        continue
                    os.environ[devices.PRECISION] = precision
                    found = measure(args.data, cell, seed, changes, device)
                    what = {"cell": cell, "seed": seed, "variant": name, "precision": precision}
                    rows.append(what | found)
                    print(rows[-1], flush=True)
                    with atomic(args.output) as temporary:
                        pd.DataFrame(rows).to_csv(temporary, index=False)


if __name__ == "__main__":
    run(main)
