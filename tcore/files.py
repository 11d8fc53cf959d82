"""Files: written whole or not at all, and read without executing anything.

Every writer writes to a temporary name beside the target and renames it, so an
interrupted step leaves no file that could be taken for a result. Tensors travel as
safetensors (bytes and a JSON header, no pickle), tables as Parquet, notes as JSON;
equal content gives equal bytes.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class InputError(ValueError):
    """Something the user can mend: the message names the file, the field and the remedy."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block ends without an error.

    Raises InputError where the disk is full or the folder must not be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        reason = f"{path}: cannot be written ({os.strerror(error.errno)})"
        raise InputError(f"{reason}; make room or let it be written, then run again") from error
    finally:
        if temporary.exists():  # on a read-only disk even unlink(missing_ok=True) fails
            temporary.unlink()


def require(path: str | Path, made_by: str = "the workflow") -> Path:
    """`path` if it is a file, otherwise an error that says where it should have come from."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; it should have been made by {made_by}")
    return path


def save_tensors(path: str | Path, tensors: dict, **meta) -> None:
    """Writes named tensors and JSON-able `meta` as one safetensors file."""
    from safetensors.torch import save

    blob = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())},
        metadata={"tcore": json.dumps(meta, sort_keys=True)},
    )
    with atomic(path) as temporary:
        temporary.write_bytes(blob)


def load_tensors(path: str | Path) -> tuple[dict, dict]:
    """The (tensors, meta) of a file written by `save_tensors`; any safetensors file will do."""
    from safetensors import SafetensorError, safe_open

    require(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("tcore", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def save_table(path: str | Path, table: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False)


def load_table(path: str | Path) -> pd.DataFrame:
    require(path)
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


def save_json(path: str | Path, value) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def load_json(path: str | Path):
    try:
        return json.loads(require(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
