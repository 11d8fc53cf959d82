"""A Parquet file with encoded images (PNG, JPEG, ...), labels and, where it has one, a column of splits;
or a CSV or Parquet file that names image files.

The image column holds bytes, or structs with a field `bytes`, or paths, relative to the table's folder
(what lies behind a path is no input of the workflow: after changing an image, change the table).
The split column marks the training rows `train` and the test rows `test` (where there are none, `val`);
other rows and other columns are ignored. Without a split column a share of every class is held out.
Class names are the JSON list `class_names` of the schema metadata, whose positions the labels then are;
otherwise the sorted distinct labels. `index` is the row in the file.

`max_train` and `max_test` keep a seeded uniform sample of a split, in file order, whatever the classes.
With `image_size` the shorter side is resized (Pillow, bilinear, antialiased) and the longer one
cropped around the centre; without it all images must have one size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv
from tqdm import tqdm

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.data.sources._reading import at_least, decode, hold_out, square, stack
from tcore.files import InputError


@dataclass(frozen=True)
class Settings:
    path: str = ""  # the file, .csv or Parquet, relative to the working directory
    image_column: str = "image"  # encoded images or paths to image files
    label_column: str = "label"  # classes, as numbers or as text
    split_column: str | None = "split"  # 'train', 'test' or 'val'; null: hold out test_share
    image_size: int | None = None  # height and width in pixels, in [1, inf); null: as stored
    max_train: int | None = None  # training images kept, in [1, inf); null: all
    max_test: int | None = None  # test images kept, in [1, inf); null: all
    test_share: float = 0.2  # share of every class held out without a split column, in (0, 1)
    seed: int = 0  # of sample and held-out share, in [0, inf); a run's random seed does not change the data


def _table(settings: Settings) -> pa.Table:
    if not Path(settings.path).is_file():
        raise InputError(f"parquet: path = {settings.path!r} is not a file; name the table to read")
    try:
        if Path(settings.path).suffix.lower() == ".csv":
            table = csv.read_csv(settings.path)
            return table.select(_columns(settings, table.column_names))
        with pq.ParquetFile(settings.path) as file:
            return file.read(_columns(settings, file.schema_arrow.names))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{settings.path}: not a readable Parquet or CSV file ({error})") from error


def _columns(settings: Settings, known: list[str]) -> list[str]:
    """The columns that the settings name, all of them in the file."""
    columns = []
    for field in ("image_column", "label_column", "split_column"):
        if (column := getattr(settings, field)) is not None:
            if column not in known:
                hint = " (null: there is none)" if field == "split_column" else ""
                raise InputError(
                    f"{settings.path}: no column {column!r}: set {field}{hint}; columns: {', '.join(known)}"
                )
            columns.append(column)
    return columns


def names(settings: Settings, index: np.ndarray) -> list[str]:
    """The paths in the image column, or else the rows, of training images by their `index`."""
    column = _table(settings)[settings.image_column]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.take(pa.array(index)).to_pylist()
    return [f"row {row}" for row in index]


def _class_names(settings: Settings, meta: dict[bytes, bytes]) -> list | None:
    try:
        names = json.loads(meta.get(b"class_names", "null"))
    except ValueError as error:
        names = error
    if isinstance(names, list | None):
        return names
    raise InputError(f"{settings.path}: class_names in the schema metadata is not a JSON list: {names}")


def _labels(
    settings: Settings, column: pa.ChunkedArray, names: list | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    where = f"{settings.path}: column {settings.label_column!r}"
    if column.null_count:
        raise InputError(f"{where} has {column.null_count} empty labels; remove those rows")
    if names is None:
        values, labels = np.unique(column.to_numpy(), return_inverse=True)
        return labels.astype(np.int64), tuple(str(value) for value in values)
    if not pa.types.is_integer(column.type):
        raise InputError(f"{where} should hold positions in class_names, not {column.type}")
    return column.to_numpy().astype(np.int64), tuple(str(name) for name in names)


def _splits(settings: Settings, column: pa.ChunkedArray | None, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of 'train' and 'test'."""
    if column is None:
        test = hold_out(labels, settings.test_share, settings.seed, settings.path)
        return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    values = column.to_numpy()
    rows = {name: np.flatnonzero(values == name) for name in ("train", "test", "val")}
    rows = {"train": rows["train"], "test": rows["test"] if len(rows["test"]) else rows["val"]}
    for name, found in rows.items():
        if not len(found):
            raise InputError(
                f"{settings.path}: no row is marked {name!r} in column {settings.split_column!r}; "
                "mark the rows or set split_column to null"
            )
    return rows


def load(settings: Settings, archives: dict) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    for name in ("image_size", "max_train", "max_test"):
        if (value := getattr(settings, name)) is not None:
            at_least(1, value, f"parquet: {name}")
    table = _table(settings)
    meta = table.schema.metadata or {}
    names = _class_names(settings, meta)
    labels, names = _labels(settings, table[settings.label_column], names)
    splits = _splits(settings, table[settings.split_column] if settings.split_column else None, labels)
    images = table[settings.image_column]
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    origin = meta.get(b"name", Path(settings.path).name.encode()).decode()

    def read(row: int):
        where = f"{settings.path}: row {row} of column {settings.image_column!r}"
        content = images[row].as_py()
        if isinstance(content, str):
            path = Path(settings.path).parent / content
            where, content = f"{path} ({where})", path
        if not isinstance(content, bytes | Path):
            raise InputError(f"{where} holds neither bytes nor a path but {type(content).__name__}")
        image = decode(content, where)
        return image if settings.image_size is None else square(image, settings.image_size)

    def split(name: str, limit: int | None) -> ImageSet:
        rows = splits[name]
        if limit is not None and limit < len(rows):
            rng = np.random.default_rng(seeds.derive(settings.seed, "parquet", name))
            rows = np.sort(rng.choice(rows, limit, replace=False))
        bar = tqdm(rows.tolist(), desc=f"reading {settings.path}, {name}", unit="image")
        pixels = stack(map(read, bar), len(rows), settings.path)
        return ImageSet(pixels, labels[rows], rows, names, f"{origin}, {name}")

    return {"train": split("train", settings.max_train), "test": split("test", settings.max_test)}
