"""Methods are found by file name: `tcore/<family>/<name>.py` is the method `<name>`.

There is no list to edit and nothing is imported until it is asked for, so a new file
is a new method and changes nothing about the others.
"""

import ast
import difflib
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from tcore.files import InputError

ROOT = Path(__file__).parents[1]


def names(family: str) -> list[str]:
    """The methods of a family such as 'dataset_attacks' or 'data/sources', sorted."""
    return sorted(p.stem for p in (ROOT / family).glob("*.py") if not p.stem.startswith("_"))


def check(family: str, name: str) -> str:
    """`name`, or an error that lists what there is and suggests the nearest."""
    known = names(family)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown name {name!r} among {family}: {hint}known: {', '.join(known)}")


def path(family: str, name: str) -> Path:
    return ROOT / family / f"{check(family, name)}.py"


@cache
def base(family: str, name: str) -> str:
    """The method that `name` runs: itself or, for a variant `<method>_<more>`, the longest that fits."""
    fitting = [method for method in names(family) if f"{name}_".startswith(f"{method}_")]
    return max(fitting, key=len) if fitting else check(family, name)


@cache
def on_weights(attack: str) -> bool:
    """Whether an attack on encoders changes weights; the others define `poison_images`, and train on those.

    Read from the source: planning a workflow imports no method.
    """
    tree = ast.parse(path("encoder_attacks", attack).read_text())
    return not any(isinstance(node, ast.FunctionDef) and node.name == "poison_images" for node in tree.body)


@cache
def architectures() -> list[str]:
    """The names of `ARCHITECTURES` in tcore/models/encoder.py, which needs torch to be imported."""
    for node in ast.parse(path("models", "encoder").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ARCHITECTURES":
            return [key.value for key in node.value.keys]
    raise AssertionError("tcore/models/encoder.py defines no ARCHITECTURES")


def load(family: str, name: str) -> ModuleType:
    return importlib.import_module(f"tcore.{family.replace('/', '.')}.{check(family, name)}")
