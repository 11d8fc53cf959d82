"""Settings of methods, read from their source without importing it.

A method with settings has one frozen dataclass `Settings` whose fields carry a type, a
default (the paper's value where it states one) and, as a comment on the same line, what
they mean. That class is the only place where a default is written: the configuration
overrides it, `config/README.md` is generated from it. Reading the source rather than
importing the module keeps torch out of the process that plans the workflow.
"""

import ast
import difflib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tcore.experiment import registry
from tcore.files import InputError

FAMILIES = (
    "data/sources",
    "pretraining",
    "encoder_attacks",
    "dataset_attacks",
    "defenses",
    "stages",
    "models",
    "paper/figures",
)


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    default: object
    text: str


@cache
def fields(path: Path) -> dict[str, Field]:
    """The fields of the class `Settings` in a source file, {} if it has none."""
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            return {
                item.target.id: Field(
                    name=item.target.id,
                    type=ast.unparse(item.annotation),
                    default=ast.literal_eval(item.value),
                    text=lines[item.end_lineno - 1].partition("#")[2].strip(),
                )
                for item in node.body
                if isinstance(item, ast.AnnAssign)
            }
    return {}


@cache
def constants(path: Path) -> dict:
    """The module constants (upper-case names with literal values) of a source file."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.isupper():
                with suppress(ValueError):  # not a literal
                    found[name] = ast.literal_eval(node.value)
    return found


@cache
def methods() -> dict[str, Path]:
    """Every method that has settings, by name."""
    found = {name: registry.path(family, name) for family in FAMILIES for name in registry.names(family)}
    return {name: path for name, path in sorted(found.items()) if fields(path)}


def _fits(value, kind: str) -> bool:
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind.startswith("tuple["):
        inner = kind[6:-1].split(", ")[0]
        return isinstance(value, list | tuple) and all(_fits(v, inner) for v in value)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return type(value).__name__ == kind


def resolve(method: str, overrides: dict | None = None, where: str = "methods") -> dict:
    """The full settings of a method: its defaults with the configuration's overrides.

    Raises InputError for an unknown key (naming the nearest) or a value of the wrong type.
    """
    return complete(methods().get(method), overrides, f"{where}.{method}")


def complete(path: Path | None, overrides: dict | None, where: str) -> dict:
    """The same for the class `Settings` of any source file; `where` it stands in the configuration."""
    known = fields(path) if path else {}
    for key, value in (overrides or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"config: {where}.{key} is not a setting: {hint}known: {', '.join(known) or 'none'}"
            )
        if not _fits(value, known[key].type):
            raise InputError(f"config: {where}.{key} = {value!r} should be of type {known[key].type}")
    return {name: field.default for name, field in known.items()} | (overrides or {})
