"""Unpacks a Parquet file of encoded images into PNG files, train/<class>/ and test/<class>/.

For trying `tcore secure` on a folder, as most people have their images.
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tcore.data.sources import parquet
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parquet", required=True, help="as in config/photographs.yaml")
    parser.add_argument("--max-train", type=int, help="images kept; default all")
    parser.add_argument("--max-test", type=int)
    parser.add_argument("--folder", type=Path, required=True, help="out")
    args = parser.parse_args()

    settings = parquet.Settings(path=args.parquet, max_train=args.max_train, max_test=args.max_test)
    for split, images in parquet.load(settings, {}).items():
        rows = zip(images.pixels, images.labels, images.index, strict=True)
        for pixels, label, index in tqdm(rows, total=len(images), desc=f"writing {split}", unit="image"):
            path = args.folder / split / images.class_names[label].replace("/", "_") / f"{index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    run(main)
