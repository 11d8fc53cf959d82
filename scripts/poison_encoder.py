"""Backdoors a pre-trained encoder: what stranger one hands to the user.

The record has settings and random seed, the references' indices (none where a file has them) and SHA-256, the
means of every epoch's loss terms, seconds, peak memory, and the leave-one-out kNN accuracy of the backdoored
and of the clean encoder. No step of a defender reads it.
"""

import argparse
import json
from dataclasses import asdict
from hashlib import sha256

from tcore import device as devices
from tcore.data.images import read_images
from tcore.encoder_attacks._references import choose_references, read_references
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.models.encoder import load_encoder, save_encoder
from tcore.models.knn import knn_accuracy
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True, help="clean encoder")
    parser.add_argument("--shadow", required=True, help="images of the pre-training set (Parquet)")
    parser.add_argument(
        "--downstream", required=True, help="labelled images that the references come from (Parquet)"
    )
    parser.add_argument("--attack", required=True, help="file name in tcore/encoder_attacks")
    parser.add_argument("--target", type=int, required=True, help="target class of the downstream task")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON object of the attack's settings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--encoder-out", required=True, help="out: the backdoored encoder")
    parser.add_argument("--trigger", required=True, help="out: its trigger")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    attack = registry.load("encoder_attacks", args.attack)
    settings = attack.Settings(**resolve(args.attack, args.settings, "--settings"))
    device = devices.pick(args.device)
    encoder = load_encoder(args.encoder)
    size = encoder.image_size
    trigger = attack.make_trigger(size, size, settings, args.seed)

    described = {"attack": args.attack, "target": args.target, **asdict(settings)}
    with record(args.record, "poison_encoder", described, args.seed, device) as log:
        downstream = read_images(args.downstream)
        if path := getattr(settings, "reference_file", None):
            references, rows = read_references(path, size, size)[0], []
        else:
            rows = choose_references(encoder, downstream, args.target, settings.references, device).numpy()
            references = downstream.tensor[rows]
        shadow = read_images(args.shadow).tensor
        victim, training = attack.poison_encoder(
            encoder, shadow, references, trigger, settings, args.seed, device
        )
        save_encoder(args.encoder_out, victim)
        triggers.save(args.trigger, trigger, "encoder_attacks", args.attack, args.target)
        log |= {
            "references": downstream.index[rows].tolist(),
            "references_sha256": sha256(references.contiguous().numpy()).hexdigest(),
            "knn_accuracy": knn_accuracy(victim.to(device), downstream),
            "knn_accuracy_clean": knn_accuracy(encoder.to(device), downstream),
            **training,
        }


if __name__ == "__main__":
    run(main)
