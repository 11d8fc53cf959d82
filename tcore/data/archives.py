"""Archives as their publishers offer them: fetched, checked against a checksum, read without unpacking."""

import hashlib
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from tcore.files import InputError, atomic, require


@dataclass(frozen=True)
class Archive:
    name: str  # file name
    url: str
    checksum: str  # "md5:<hex>" or "sha256:<hex>"


def verify(path: str | Path, checksum: str, source: str | None = None) -> None:
    """Raises InputError unless the file has `checksum`; the message names `source` (or the path)."""
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in ("md5", "sha256") or not expected:
        raise InputError(f"checksum {checksum!r} should read md5:<hex> or sha256:<hex>")
    with require(path, made_by="a download").open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected.lower():
        raise InputError(
            f"{source or path}: {algorithm} is {found}, expected {expected}: "
            "not the published file or damaged on its way; fetch it again"
        )


def download(url: str, checksum: str, output: str | Path) -> None:
    """Streams `url` to `output`, which appears only when whole and with the right checksum."""
    with atomic(output) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as response, temporary.open("wb") as file:
                total = int(response.headers.get("Content-Length") or 0) or None
                with tqdm(total=total, unit="B", unit_scale=True, desc=Path(output).name) as bar:
                    while chunk := response.read(1 << 20):
                        bar.update(file.write(chunk))
            if total and temporary.stat().st_size != total:
                raise OSError(f"the connection ended after {temporary.stat().st_size} of {total} bytes")
        except (OSError, HTTPException, ValueError) as error:
            raise InputError(
                f"{url}: download failed ({error}); try again, or fetch the file in another way "
                f"and put it at {output}"
            ) from error
        verify(temporary, checksum, source=url)


def read_tar(path: str | Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The contents of the files `names` of a tar archive, in one pass, nothing unpacked."""
    require(path, made_by="a download")
    try:
        with tarfile.open(path, "r|*") as tar:
            found = {
                item.name: tar.extractfile(item).read()
                for item in tar
                if item.name in names and item.isfile()
            }
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: not a readable tar archive ({error}); fetch it again") from error
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{path}: has no file {missing[0]}; is it the published archive?")
    return found
