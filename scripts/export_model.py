"""The clean model as TorchScript, with normalisation and class names inside."""

import argparse

from tcore.files import load_tensors
from tcore.models.classifier import load_classifier
from tcore.received.export import export
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--exported", required=True, help="out: the TorchScript file")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    with record(args.record, "export_model", {}, None):
        names = load_tensors(args.model)[1]["class_names"]
        export(args.exported, load_classifier(args.model), tuple(names))


if __name__ == "__main__":
    run(main)
