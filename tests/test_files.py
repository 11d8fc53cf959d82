"""Files are written whole or not at all, and a hostile one is refused, never executed."""

import json
import os
import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tcore.data.images import ImageSet, read_images, write_images
from tcore.files import (
    InputError,
    atomic,
    load_json,
    load_table,
    load_tensors,
    require,
    save_json,
    save_table,
    save_tensors,
)


def test_atomic_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "a" / "b.txt"
    with atomic(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half of the ne")
        assert target.read_text() == "old"
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_json(path, {"a": 1}),
        lambda path: save_tensors(path, {"a": torch.zeros(3)}),
        lambda path: save_table(path, pd.DataFrame({"a": [1]})),
        lambda path: write_images(
            path, ImageSet(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, int), np.zeros(1, int), ("a",), "")
        ),
    ],
)
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, save):
    target = tmp_path / "a"
    target.write_text("old")
    part = tmp_path / f".a.{os.getpid()}.part"
    part.symlink_to("/dev/full")  # the temporary file: whatever is written to it, there is no room
    with pytest.raises(InputError, match=r"/a: cannot be written \(No space left on device\)"):
        save(target)
    assert target.read_text() == "old"
    assert not part.is_symlink()


@pytest.mark.parametrize("load", [require, load_tensors, load_table, load_json, read_images])
def test_a_missing_file_is_named_with_its_maker(tmp_path, load):
    with pytest.raises(InputError, match=r"gone.*: no such file; it should have been made by"):
        load(tmp_path / "gone")


# --- tensors ------------------------------------------------------------------------------------


def test_tensors_and_meta_come_back_as_they_were(tmp_path):
    tensors = {
        "b": torch.arange(6).reshape(2, 3).T,  # not contiguous
        "a": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(True),
    }
    save_tensors(tmp_path / "t", tensors, epochs=3, names=["x", "ü"])
    found, meta = load_tensors(tmp_path / "t")
    assert meta == {"epochs": 3, "names": ["x", "ü"]}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num())


def test_equal_content_gives_equal_bytes(tmp_path):
    a, b = torch.arange(3), torch.arange(4)
    save_tensors(tmp_path / "1", {"a": a, "b": b}, x=1, y=2)
    save_tensors(tmp_path / "2", {"b": b, "a": a}, y=2, x=1)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def safetensors(header: dict, data: bytes = b"") -> bytes:
    """The format by its description: length of the header (u64, little endian), JSON header, data."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_safetensors_file_written_by_hand_is_read(tmp_path):
    header = {"x": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}
    (tmp_path / "t").write_bytes(safetensors(header, struct.pack("<hh", -2, 300)))
    tensors, meta = load_tensors(tmp_path / "t")
    assert tensors["x"].tolist() == [-2, 300]
    assert meta == {}


def entry(start: int, stop: int, length: int) -> dict:
    return {"dtype": "U8", "shape": [length], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"plain text",
        struct.pack("<Q", 2**62) + b"{}",  # a header longer than the file
        safetensors({"a": entry(0, 8, 8)}, b"only 4"[:4]),  # cut off
        safetensors({"a": entry(0, 4, 2**40)}, b"abcd"),  # shape and bytes disagree
        safetensors({"a": entry(0, 4, 4), "b": entry(2, 6, 4)}, b"abcdef"),  # overlapping tensors
    ],
)
def test_damaged_tensors_are_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_tensors(tmp_path / "t")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_disguise_is_not_executed(tmp_path):
    trap = str(tmp_path / "executed")
    torch.save({"weight": Payload(trap)}, tmp_path / "encoder")
    with pytest.raises(InputError):
        load_tensors(tmp_path / "encoder")
    assert not os.path.exists(trap)
    torch.load(tmp_path / "encoder", weights_only=False)
    assert os.path.exists(trap)  # the trap was armed


# --- tables and notes ---------------------------------------------------------------------------


def test_tables_and_notes_come_back_as_they_were(tmp_path):
    table = pd.DataFrame({"index": [2, 0], "score": [0.1, np.nan], "view": ["clean", None]})
    save_table(tmp_path / "t.parquet", table)
    pd.testing.assert_frame_equal(load_table(tmp_path / "t.parquet"), table.astype({"view": "str"}))
    save_json(tmp_path / "n.json", {"b": 1, "a": [None, 0.1]})
    assert load_json(tmp_path / "n.json") == {"a": [None, 0.1], "b": 1}


def test_damaged_tables_and_notes_are_refused(tmp_path):
    (tmp_path / "a").write_text("{'not': 'JSON'}")
    with pytest.raises(InputError, match="not valid JSON"):
        load_json(tmp_path / "a")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load_table(tmp_path / "a")


# --- images -------------------------------------------------------------------------------------


def images(n: int = 5, height: int = 3, width: int = 4) -> ImageSet:
    pixels = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)
    labels = np.arange(n) % 3 - 1
    return ImageSet(pixels, labels, np.arange(n)[::-1].copy(), ("stop", "vorfahrt gewähren"), "two signs")


@pytest.mark.parametrize("n", [0, 1, 5, 25_000])  # 25,000: three row groups
def test_images_come_back_as_they_were(tmp_path, n):
    before = images(n)
    write_images(tmp_path / "i.parquet", before)
    after = read_images(tmp_path / "i.parquet")
    for field in ("pixels", "labels", "index"):
        assert getattr(after, field).dtype == getattr(before, field).dtype
        assert np.array_equal(getattr(after, field), getattr(before, field))
        assert getattr(after, field).flags.writeable
    assert (after.class_names, after.origin) == (before.class_names, before.origin)


def test_the_image_format_is_the_documented_one(tmp_path):
    write_images(tmp_path / "i.parquet", images())
    table = pq.read_table(tmp_path / "i.parquet")
    assert table.column_names == ["image", "label", "index"]
    assert table.schema.field("image").type == pa.binary(3 * 4 * 3)
    assert table["image"][1].as_py() == bytes(
        int(images().pixels[1, y, x, c]) for y in range(3) for x in range(4) for c in range(3)
    )
    meta = {key.decode(): json.loads(value) for key, value in table.schema.metadata.items()}
    assert meta == {
        "height": 3,
        "width": 4,
        "class_names": ["stop", "vorfahrt gewähren"],
        "origin": "two signs",
    }


def test_equal_images_give_equal_bytes_whatever_their_layout(tmp_path):
    whole = images(10)
    write_images(tmp_path / "1", whole.select(slice(0, 10, 2)))  # a strided view
    write_images(tmp_path / "2", whole.select(np.arange(0, 10, 2)))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_select_and_tensor_views():
    chosen = images().select(np.array([4, 0]))
    assert chosen.index.tolist() == [0, 4]
    assert torch.equal(chosen.tensor[0, :, 2, 1], torch.from_numpy(images().pixels[4, 2, 1]))
    assert chosen.tensor.data_ptr() == chosen.pixels.ctypes.data
    assert images().select(images().labels == 1).targets.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((5, 3, 4, 3), np.float32)}, "must be uint8"),
        ({"pixels": np.zeros((5, 3, 4), np.uint8)}, "must be uint8"),
        ({"labels": np.zeros(4, np.int64)}, "5 images but"),
        ({"index": np.zeros((5, 1), np.int64)}, "5 images but"),
        ({"labels": np.full(5, 2)}, r"labels 2\.\.2 do not fit 2 class names"),
        ({"labels": np.full(5, -2)}, "do not fit"),
    ],
)
def test_image_sets_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(InputError, match=f"two signs: .*{message}"):
        ImageSet(**{**vars(images()), **change})


META = {"height": "2", "width": "2", "class_names": '["a", "b"]', "origin": '"x"'}
COLUMNS = {"image": pa.array([bytes(12)] * 2, pa.binary(12)), "label": [0, 1], "index": [0, 1]}


@pytest.mark.parametrize(
    ("meta", "columns", "message"),
    [
        (None, COLUMNS, "not an image file of this project"),
        ({**META, "height": "two"}, COLUMNS, "not an image file of this project"),
        ({"height": "2"}, COLUMNS, "not an image file of this project"),
        ({**META, "height": "3"}, COLUMNS, r"expected.* 18 bytes|binary\[18\]"),
        (META, {**COLUMNS, "image": [b"png", b"jpeg"]}, r"'image' is binary|binary\[12\]"),
        (META, {**COLUMNS, "label": [0, 2]}, "do not fit 2 class names"),
    ],
)
def test_foreign_image_files_are_refused(tmp_path, meta, columns, message):
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), tmp_path / "i.parquet")
    with pytest.raises(InputError, match=message):
        read_images(tmp_path / "i.parquet")


def test_a_cut_image_file_is_refused(tmp_path):
    write_images(tmp_path / "i.parquet", images(100))
    whole = (tmp_path / "i.parquet").read_bytes()
    (tmp_path / "i.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not an image file of this project"):
        read_images(tmp_path / "i.parquet")
