"""T-Core, stage 3: bootstraps a clean model from the clean subset and the trusted channels."""

import argparse
import json

import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import load_table, load_tensors, save_table
from tcore.models import head as heads
from tcore.models.classifier import load_classifier, save_classifier
from tcore.running.cli import run
from tcore.running.record import record
from tcore.stages import bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the suspect classifier, for its encoder")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--seeds", required=True, help="table of samples: `in_core` for sifting's core")
    parser.add_argument("--subset", required=True, help="the clean subset: round 0 or more")
    parser.add_argument("--channels", required=True, help="masks and untrusted channels by layer")
    parser.add_argument("--settings", type=json.loads, required=True, help='JSON: {"bootstrap", "head"}')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model-out", required=True, help="out: the clean classifier")
    parser.add_argument("--pool", required=True, help="out: round and phase in which each sample joined")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    settings = bootstrap.Settings(**args.settings["bootstrap"])
    head = heads.Settings(**args.settings["head"])
    with record(args.record, "bootstrap", args.settings, args.seed, device) as log:
        images = read_images(args.images)
        subset = torch.from_numpy((load_table(args.subset)["round"] >= 0).to_numpy(copy=True)).to(device)
        core = torch.from_numpy(load_table(args.seeds)["in_core"].to_numpy(copy=True)).to(device)
        channels, _ = load_tensors(args.channels)
        untrusted = {
            name.removeprefix("untrusted."): flags.to(device)
            for name, flags in channels.items()
            if name.startswith("untrusted.")
        }
        model, pool, found = bootstrap.bootstrap(
            load_classifier(args.model).to(device).encoder,
            images.tensor.to(device),
            images.targets.to(device),
            images.num_classes,
            subset,
            core,
            untrusted,
            settings,
            head,
            args.seed,
        )
        save_classifier(args.model_out, model.cpu(), images.class_names)
        save_table(args.pool, pool.assign(index=images.index))
        log |= found


if __name__ == "__main__":
    run(main)
