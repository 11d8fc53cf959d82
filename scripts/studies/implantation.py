"""Does each attack implant? Accuracy and attack success of undefended models on real images.

Two victims: a small network trained end to end on the poisoned images, and, given an encoder, a head on
its frozen features. One line of CSV per attack and victim. The classes have the paper's parts on CIFAR-10.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from tcore import device as devices
from tcore.data.images import ImageSet
from tcore.data.sources import parquet
from tcore.evaluation import metrics
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.files import atomic
from tcore.models import end_to_end
from tcore.models import head as heads
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import extract_features, load_encoder
from tcore.poisoning.poisoned import Poisoned
from tcore.poisoning.triggers import in_blocks
from tcore.running.cli import run

ATTACKS = ("badnets", "blended", "sig", "wanet", "tact", "adap_blend", "adap_patch")


def outcome(model: Classifier, test: ImageSet, poisoned: Poisoned) -> dict[str, float]:
    stamp = in_blocks(registry.load(*poisoned.trigger_of).stamp, poisoned.trigger)
    clean, triggered = (logits(model, x).argmax(1).cpu().numpy() for x in (test.tensor, stamp(test.tensor)))
    target = poisoned.target if poisoned.goals is None else poisoned.goals
    found = {
        "acc": metrics.accuracy(clean, test.labels),
        "asr": metrics.attack_success_rate(triggered, test.labels, target),
        "before": metrics.attack_success_rate(clean, test.labels, target),
        "robust": metrics.robust_accuracy(triggered, test.labels, target),
    }
    if poisoned.goals is not None and poisoned.target is not None:
        found["leak"] = metrics.leak(triggered, test.labels, poisoned.target, poisoned.goals)
    return {name: share.value for name, share in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parquet", required=True, help="labelled images, as for the data source `parquet`")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON object for all these attacks")
    parser.add_argument("--target", type=int, default=2)
    parser.add_argument("--encoder", help="encoder file: also train a head on its frozen features")
    parser.add_argument("--no-end-to-end", action="store_true", help="the frozen encoder's head only")
    parser.add_argument("--max-train", type=int, default=10_000)
    parser.add_argument("--max-test", type=int, default=2_000)
    parser.add_argument("--architecture", default="resnet_narrow")
    parser.add_argument("--epochs", type=int, default=20, help="of training end to end")
    parser.add_argument("--batch", type=int, default=64, help="of training end to end")
    parser.add_argument("--lr", type=float, default=0.05, help="of training end to end, at its peak")
    parser.add_argument("--head", type=json.loads, default={}, help="JSON object of the head's settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, type=Path, help="CSV; lines are added to it")
    args = parser.parse_args()

    device = devices.pick()
    data = parquet.load(
        parquet.Settings(path=args.parquet, max_train=args.max_train, max_test=args.max_test), {}
    )
    head_settings = heads.Settings(**resolve("head", args.head, "--head"))
    for name in args.attacks:
        attack = registry.load("dataset_attacks", name)
        settings = attack.Settings(**resolve(name, args.settings, "--settings"))
        poisoned = attack.poison(data["train"], args.target, settings, args.seed)
        counts = {part: int(poisoned.truth[f"is_{part}"].sum()) for part in ("poison", "cover")}
        models = {}
        if not args.no_end_to_end:
            models["end to end"] = end_to_end.train(
                poisoned.images, args.architecture, args.epochs, args.batch, args.lr, args.seed, device
            )
        if args.encoder:
            encoder = load_encoder(args.encoder).to(device)
            features = extract_features(encoder, poisoned.images.tensor)
            head = heads.new_head(encoder.dim, data["train"].num_classes, head_settings, args.seed, "head")
            labels = poisoned.images.targets.to(device)
            heads.fit_head(head, features, labels, head_settings.epochs, args.seed, "head")
            models["frozen encoder"] = Classifier(encoder, head)
        for victim, model in models.items():
            line = {"attack": name, "victim": victim, "seed": args.seed, "images": len(data["train"])}
            line |= counts | outcome(model, data["test"], poisoned) | {"settings": json.dumps(args.settings)}
            print(line)
            lines = [pd.read_csv(args.output)] if args.output.exists() else []
            with atomic(args.output) as temporary:
                pd.concat([*lines, pd.DataFrame([line])]).to_csv(temporary, index=False, float_format="%.4f")


if __name__ == "__main__":
    run(main)
