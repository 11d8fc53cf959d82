"""The evaluator's test: predictions on clean and triggered test images."""

import argparse

import pandas as pd

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import save_table
from tcore.models.classifier import load_classifier, logits
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--test", required=True, help="test images (Parquet)")
    parser.add_argument("--encoder-trigger", help="of a known attack")
    parser.add_argument("--dataset-trigger", help="of a known attack")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--predictions", required=True, help="out: prediction per view and test image")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    with record(args.record, "predict", {}, args.seed, device):
        model = load_classifier(args.model).to(device)
        test = read_images(args.test)
        views = {"clean": test.tensor}
        for view in ("encoder_trigger", "dataset_trigger"):
            path = getattr(args, view)
            stamp = triggers.load(path)[0] if path else None
            if stamp is not None:
                views[view] = stamp(test.tensor)
        tables = [
            pd.DataFrame(
                {
                    "index": test.index,
                    "label": test.labels,
                    "view": view,
                    "prediction": logits(model, images).argmax(1).cpu().numpy(),
                }
            )
            for view, images in views.items()
        ]
        save_table(args.predictions, pd.concat(tables, ignore_index=True))


if __name__ == "__main__":
    run(main)
