"""Puts a saved trigger on a picture, or on every picture of a folder, for looking at.

Pictures of another size than the trigger's are resized and cropped around the centre. Each becomes a PNG of
the same name: the stamped picture, or with --compare the clean one, the stamped one and their difference
magnified, side by side.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tcore.data.sources._reading import decode
from tcore.data.sources.imagefolder import SUFFIXES
from tcore.files import InputError, atomic, load_tensors
from tcore.poisoning import triggers
from tcore.report import charts
from tcore.running.cli import run


def pictures(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(
            f"{path}: neither a picture nor a folder with pictures ({', '.join(sorted(SUFFIXES))})"
        )
    names = [file.stem for file in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: two pictures are called {twice}; rename one")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trigger", required=True, help="trigger file of a poisoned data set or encoder")
    parser.add_argument("--pictures", required=True, type=Path, help="a picture or a folder of them")
    parser.add_argument("--output", required=True, type=Path, help="out: folder of PNG files")
    parser.add_argument("--compare", action="store_true", help="clean, stamped, difference, side by side")
    args = parser.parse_args()

    stamp, _ = triggers.load(args.trigger)
    if stamp is None:
        raise InputError(f"{args.trigger}: the trigger of a clean set; there is nothing to stamp")
    sizes = [tensor.shape[-2:] for tensor in load_tensors(args.trigger)[0].values() if tensor.ndim > 2]
    for path in tqdm(pictures(args.pictures), desc="stamping", unit="picture"):
        picture = decode(path, str(path))
        if sizes:
            height, width = sizes[0]
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        clean = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        stamped = stamp(clean)
        views = [clean, stamped, charts.difference(clean, stamped)[0]] if args.compare else [stamped]
        with atomic(args.output / f"{path.stem}.png") as temporary:
            Image.fromarray(torch.cat(views, 3)[0].permute(1, 2, 0).numpy()).save(temporary, "PNG")


if __name__ == "__main__":
    run(main)
