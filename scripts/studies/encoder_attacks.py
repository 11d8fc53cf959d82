"""Do the attacks on encoders implant, and at what cost? A row per attack and seed of a run without defence.

Reads what a run of `config/encoder-attacks.yaml`, or another with the scenarios clean and T1, has left in
its data folder: accuracy behind the clean and the backdoored encoder, the attack's success behind both
(behind the clean one: what the trigger does by itself), nearest-neighbour accuracy of both, seconds and
peak memory of the attack's steps.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from tcore import device as devices
from tcore.data.images import read_images
from tcore.evaluation import metrics
from tcore.files import atomic
from tcore.models.classifier import load_classifier, logits
from tcore.poisoning import triggers
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--pretrain", required=True, help="the data set that the encoders come from")
    parser.add_argument("--downstream", required=True)
    parser.add_argument("--attacks", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", required=True, type=Path, help="out: CSV")
    args = parser.parse_args()

    device = devices.pick()
    test = read_images(args.data / "datasets" / args.downstream / "test.parquet")

    def predicted(encoder_attack: str, seed: int, images: Tensor) -> np.ndarray:
        cell = f"{args.pretrain}-{encoder_attack}/{args.downstream}-clean/{seed}"
        model = load_classifier(args.data / "defended" / cell / "none/model.safetensors").to(device)
        return logits(model, images).argmax(1).cpu().numpy()

    rows = []
    for seed in args.seeds:
        clean_acc = metrics.accuracy(predicted("clean", seed, test.tensor), test.labels).value
        encoders = args.data / "encoders"
        pretrained = json.loads(
            (encoders / f"{args.pretrain}-clean/{seed}/pretrain_encoder.run.json").read_text()
        )
        for attack in args.attacks:
            folder = encoders / f"{args.pretrain}-{attack}/{args.downstream}/{seed}"
            stamp, meta = triggers.load(folder / "trigger.safetensors")
            stamped = stamp(test.tensor)
            success = {
                encoder: metrics.attack_success_rate(
                    predicted(encoder, seed, stamped), test.labels, meta["target"]
                ).value
                for encoder in (attack, "clean")
            }
            records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.run.json"))]
            knn = [r["log"]["knn_accuracy"] for r in records if "knn_accuracy" in r["log"]]
            rows.append(
                {
                    "attack": attack,
                    "seed": seed,
                    "acc_clean": clean_acc,
                    "acc": metrics.accuracy(predicted(attack, seed, test.tensor), test.labels).value,
                    "asr": success[attack],
                    "asr_clean": success["clean"],
                    "knn_clean": pretrained["log"]["knn_accuracy"],
                    "knn": knn[-1] if knn else None,
                    "seconds": sum(r["seconds"] for r in records),
                    "peak_ram_mb": max(r["peak_ram_mb"] for r in records),
                }
            )
    table = pd.DataFrame(rows)
    with atomic(args.output) as path:
        table.to_csv(path, index=False)
    print(
        table.groupby("attack", sort=False).mean(numeric_only=True).drop(columns="seed").round(3).to_string()
    )


if __name__ == "__main__":
    run(main)
