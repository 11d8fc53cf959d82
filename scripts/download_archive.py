"""Downloads one archive and checks it."""

import argparse

from tcore.data.archives import download
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--checksum", required=True, help="md5:<hex> or sha256:<hex>")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    download(args.url, args.checksum, args.output)


if __name__ == "__main__":
    run(main)
