"""The audit of what came from outside: a page, and all training images ranked by distrust."""

import argparse
import json
from pathlib import Path

from tcore import device as devices
from tcore.data.images import read_images
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.files import atomic, load_json, load_table, load_tensors
from tcore.models.classifier import load_classifier
from tcore.received import audit
from tcore.report import report
from tcore.running.cli import run
from tcore.running.record import record

TEMPLATE = Path(__file__).resolve().parents[1] / "workflow" / "audit.html.jinja"
TABLES = ("seeds", "subset", "pool")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checked", required=True, help="the record of check_received")
    parser.add_argument("--encoder", required=True, help="the record of import_encoder")
    parser.add_argument("--train", required=True, help="the labelled training images (Parquet)")
    parser.add_argument("--test", required=True, help="the held-out images (Parquet)")
    parser.add_argument("--model", required=True, help="T-Core's clean model")
    for name in TABLES:
        parser.add_argument(f"--{name}", required=True, help="of T-Core")
    parser.add_argument("--expanded", required=True, help="the record of expand")
    parser.add_argument("--channels", required=True, help="of T-Core")
    parser.add_argument("--undefended", required=True, help="predictions of the model without a defence")
    parser.add_argument("--defended", required=True, help="predictions of the clean model")
    parser.add_argument("--source", required=True, help="where the images come from, for their names")
    parser.add_argument("--settings", type=json.loads, required=True, help="JSON: the source's settings")
    parser.add_argument("--audit", required=True, help="out: the page")
    parser.add_argument("--distrust", required=True, help="out: CSV, least trusted images first")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    source = registry.load("data/sources", args.source)
    settings = source.Settings(**resolve(args.source, args.settings, "--settings"))
    with record(args.record, "audit", {}, None, device) as log:
        context, table = audit.build(
            read_images(args.train),
            read_images(args.test),
            load_classifier(args.model).to(device),
            {name: load_table(getattr(args, name)) for name in TABLES},
            load_json(args.expanded)["log"],
            load_tensors(args.channels),
            {"none": load_table(args.undefended), "tcore": load_table(args.defended)},
            load_json(args.checked)["log"],
            load_json(args.encoder)["log"],
        )
        if hasattr(source, "names"):
            table.insert(0, "image", source.names(settings, table["index"].to_numpy()))
        table.index += 1
        page = report.render(context, TEMPLATE)
        with atomic(args.distrust) as temporary:
            table.to_csv(temporary, index_label="rank")
        with atomic(args.audit) as temporary:
            temporary.write_text(page, encoding="utf-8")
        log["indicators"] = context["indicators"]


if __name__ == "__main__":
    run(main)
