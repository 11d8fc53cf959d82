"""Do an encoder and images from outside and T-Core's settings go together? Asked before the long part."""

import argparse
import json

from tcore import device as devices
from tcore.data.images import read_images
from tcore.models.encoder import load_encoder
from tcore.received.check import check
from tcore.running.cli import run
from tcore.running.record import record
from tcore.stages import bootstrap, expand, filter_channels, sift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--images", required=True, help="the labelled training images (Parquet)")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="JSON: settings of T-Core's four stages"
    )
    parser.add_argument("--record", required=True, help="out: the record of this step, with what was found")
    args = parser.parse_args()

    device = devices.pick()
    stages = (sift, expand, filter_channels, bootstrap)
    settings = [stage.Settings(**args.settings[stage.__name__.rpartition(".")[2]]) for stage in stages]
    with record(args.record, "check_received", args.settings, None, device) as log:
        log |= check(load_encoder(args.encoder).to(device), read_images(args.images), *settings)
        print(
            f"{log['images']:,} training images of {log['classes']:,} classes, {log['smallest']:,} to "
            f"{log['largest']:,} each; T-Core will take about {log['seconds']:,} seconds here, without heads"
        )


if __name__ == "__main__":
    run(main)
