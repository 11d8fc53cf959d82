"""What a cell's predictions, and what its defence said on the way, are worth. Reads the truth."""

import argparse
import json

from tcore.evaluation import results
from tcore.files import InputError, load_json, load_table, load_tensors, save_table
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions", required=True)
    parser.add_argument("--truth", required=True)
    parser.add_argument("--encoder-trigger", required=True)
    parser.add_argument("--dataset-trigger", required=True)
    stages = [
        parser.add_argument(f"--{name}", help="of T-Core") for name in ("seeds", "subset", "pool", "channels")
    ]
    parser.add_argument("--samples", help="of a detector")
    parser.add_argument("--inputs", help="of an input detector: its scores of test images")
    parser.add_argument("--defended", help="of a baseline defence: the record of its step")
    parser.add_argument(
        "--identity", type=json.loads, required=True, help=f"JSON with {', '.join(results.IDENTITY)}"
    )
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--record", required=True)
    args = parser.parse_args()
    given = [stage.dest for stage in stages if getattr(args, stage.dest)]
    if given and len(given) < len(stages):
        raise InputError(f"--{' --'.join(given)}: T-Core's four files go together; give all or none")

    with record(args.record, "evaluate", {}, args.identity.get("seed")):
        reason = load_json(args.defended)["log"].get("not_applicable") if args.defended else None
        if reason:
            save_table(args.metrics, results.tidy(args.identity, [results.not_applicable(reason)]))
            return
        predictions = results.need(
            load_table(args.predictions), ["label", "view", "prediction"], args.predictions
        )
        metas = {
            "encoder": load_tensors(args.encoder_trigger)[1],
            "dataset": load_tensors(args.dataset_trigger)[1],
        }
        rows = results.test_rows(predictions, metas, args.identity.get("dataset_attack"))
        if given:
            columns = {
                args.truth: ["index", "is_poison", "is_cover"],
                args.seeds: ["index", "label", "trusted"],
                args.subset: ["index", "round"],
                args.pool: ["index", "round"],
            }
            tables = [results.need(load_table(path), needed, path) for path, needed in columns.items()]
            rows += results.stage_rows(*tables) + results.channel_rows(load_tensors(args.channels)[0])
        if args.samples:
            truth = results.need(load_table(args.truth), ["index", "is_poison", "is_cover"], args.truth)
            samples = results.need(load_table(args.samples), list(results.SAMPLES), args.samples)
            rows += results.detector_rows(truth, samples)
        if args.inputs:
            inputs = results.need(load_table(args.inputs), ["label", "view", "score", "flagged"], args.inputs)
            rows += results.input_rows(inputs, metas, args.identity.get("dataset_attack"))
        save_table(args.metrics, results.tidy(args.identity, rows))


if __name__ == "__main__":
    run(main)
