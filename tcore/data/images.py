"""The one image format: labelled uint8 images in a Parquet file.

One row per image: `image` (fixed_size_binary, height x width x 3 bytes, RGB, row-major),
`label` (int64, -1 where there is none) and `index` (int64, the row's number in its source). Where images of
other shapes were stretched to the common size, `aspect` (float32): width over height as they were.
The schema metadata holds `height`, `width`, `class_names` and `origin` as JSON.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tcore.files import InputError, atomic, require
from tcore.running import memory

GROUP = 2**24  # bytes of images written, and read, at a time


@dataclass(frozen=True)
class ImageSet:
    """Images with labels. `pixels` (N, H, W, 3) uint8, `labels` and `index` (N,) int64.

    `aspects` (N,) float32: width over height before images were stretched to squares; None: none was.
    """

    pixels: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    class_names: tuple[str, ...]
    origin: str
    aspects: np.ndarray | None = None

    def __post_init__(self):
        n = len(self.pixels)
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[3] != 3:
            raise InputError(
                f"{self.origin}: pixels must be uint8 (N, H, W, 3), "
                f"not {self.pixels.dtype} {self.pixels.shape}"
            )
        if self.labels.shape != (n,) or self.index.shape != (n,):
            raise InputError(
                f"{self.origin}: {n} images but {self.labels.shape} labels and {self.index.shape} indices"
            )
        if n and not -1 <= self.labels.min() <= self.labels.max() < max(len(self.class_names), 0):
            raise InputError(
                f"{self.origin}: labels {self.labels.min()}..{self.labels.max()} "
                f"do not fit {len(self.class_names)} class names"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def tensor(self):
        """The images as a torch tensor (N, 3, H, W) uint8, channels last in memory, not copied."""
        import torch

        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2)

    @cached_property
    def targets(self):
        """The labels as a torch tensor (N,) int64."""
        import torch

        return torch.from_numpy(self.labels)

    def select(self, rows) -> "ImageSet":
        """The images at `rows` (indices or a boolean mask), in that order."""
        aspects = None if self.aspects is None else self.aspects[rows]
        return ImageSet(
            self.pixels[rows], self.labels[rows], self.index[rows], self.class_names, self.origin, aspects
        )


def _schema(size: int, aspects: bool) -> pa.Schema:
    """Columns of a file whose images take `size` bytes each."""
    columns = [("image", pa.binary(size)), ("label", pa.int64()), ("index", pa.int64())]
    return pa.schema([*columns, ("aspect", pa.float32())] if aspects else columns)


def write_images(path: str | Path, images: ImageSet) -> None:
    n, height, width, _ = images.pixels.shape
    size = height * width * 3
    pixels = np.ascontiguousarray(images.pixels)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), n, [None, pa.py_buffer(pixels)])
    meta = {
        "height": height,
        "width": width,
        "class_names": list(images.class_names),
        "origin": images.origin,
    }
    columns = [column, images.labels, images.index]
    columns += [] if images.aspects is None else [images.aspects]
    schema = _schema(size, images.aspects is not None)
    schema = schema.with_metadata({key: json.dumps(value) for key, value in meta.items()})
    table = pa.table(list(map(pa.array, columns)), schema=schema)
    rows = max(1, min(10_000, GROUP // size))
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="none", use_dictionary=False, row_group_size=rows)


def read_images(path: str | Path) -> ImageSet:
    require(path)
    try:
        with pq.ParquetFile(path) as file:
            schema, n = file.schema_arrow, file.metadata.num_rows
            meta = {key.decode(): json.loads(value) for key, value in schema.metadata.items()}
            height, width = int(meta["height"]), int(meta["width"])
            expected = _schema(height * width * 3, "aspect" in schema.names)
            if min(height, width) < 1 or not schema.equals(expected):
                raise ValueError(f"columns {schema.names}, expected {expected.to_string()!r}")
            shape = (n, height, width, 3)
            memory.require(math.prod(shape), memory.free(), str(path), "take fewer or smaller images")
            pixels = np.empty(shape, np.uint8)
            others = {
                name: np.empty(n, expected.field(name).type.to_pandas_dtype()) for name in schema.names[1:]
            }
            start = 0
            for group in range(file.num_row_groups):  # all at once would be a second copy of the images
                table = file.read_row_group(group)
                if any(column.null_count for column in table.columns):
                    raise ValueError("nulls in it")
                rows = slice(start, start := start + table.num_rows)
                content = table["image"].combine_chunks().buffers()[1]
                pixels[rows] = np.frombuffer(content, np.uint8, pixels[rows].size).reshape(pixels[rows].shape)
                for name, values in others.items():
                    values[rows] = table[name].to_numpy()
        return ImageSet(
            pixels=pixels,
            labels=others["label"],
            index=others["index"],
            class_names=tuple(meta["class_names"]),
            origin=meta["origin"],
            aspects=others.get("aspect"),
        )
    except (OSError, KeyError, AttributeError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not an image file of this project ({error}); "
            "foreign files enter through the `datasets` of config/config.yaml"
        ) from error
