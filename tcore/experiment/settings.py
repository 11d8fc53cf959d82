"""Settings of methods, read from their source without importing it.

A method with settings has one frozen dataclass `Settings` whose fields carry a type, a
default (the paper's value where it states one) and, as a comment on the same line, what
they mean. That class is the only place where a default is written: the configuration
overrides it, docs/use/configuration.md and config/schema.json are generated from it. Reading the
source rather than importing the module keeps torch out of the process that plans the workflow.

The comment also says which values there are, in one of two notations:

    in [0, 1)            of numbers, or of each number of a tuple; no end at inf or -inf
    one of a, b, c       of text
"""

import ast
import difflib
import math
import re
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


NUMBER = r"-?\d[\d.e-]*"
INTERVAL = re.compile(rf"\bin ([\[(])({NUMBER}|-inf), ({NUMBER}|inf)([\])])")
CHOICES = re.compile(r"\bone of (\w+(?:, \w+)+)")


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, each of them included or not. No interval includes NaN or infinity."""

    low: float = -math.inf
    high: float = math.inf
    with_low: bool = False
    with_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return above and below and abs(value) < math.inf

    def __str__(self) -> str:
        return f"{'(['[self.with_low]}{self.low:g}, {self.high:g}{')]'[self.with_high]}"


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    default: object
    text: str

    @property
    def interval(self) -> Interval | None:
        """Of numbers, as the comment states it; None where it does not."""
        if (found := INTERVAL.search(self.text)) is None:
            return None
        opening, low, high, closing = found.groups()
        return Interval(float(low), float(high), opening == "[", closing == "]")

    @property
    def choices(self) -> tuple[str, ...]:
        """What text may be, () where anything goes."""
        found = CHOICES.search(self.text) if "str" in self.type else None
        return tuple(found[1].split(", ")) if found else ()

    def fault(self, value) -> str:
        """What `value` should be but is not; empty if it is a value of this setting."""
        if not _fits(value, self.type):
            return f"of type {self.type}"
        parts = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if self.choices and not all(part in self.choices for part in parts):
            return f"one of {', '.join(self.choices)}"
        interval = self.interval or Interval()
        if any(isinstance(part, int | float) and part not in interval for part in parts):
            return f"in {interval}"
        return ""


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
        inner, *rest = kind[6:-1].split(", ")
        listed = isinstance(value, list | tuple) and all(_fits(v, inner) for v in value)
        return listed and (rest == ["..."] or len(value) == 1 + len(rest))
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return type(value).__name__ == kind


def resolve(method: str, overrides: dict | None = None, where: str = "methods") -> dict:
    """The full settings of a method: its defaults with the configuration's overrides.

    Raises InputError that names all unknown keys (with the nearest known) and all values of the wrong type
    or out of range, a line for each.
    """
    return complete(methods().get(method), overrides, f"{where}.{method}")


def complete(path: Path | None, overrides: dict | None, where: str) -> dict:
    """The same for the class `Settings` of any source file; `where` it stands in the configuration."""
    known = fields(path) if path else {}
    faults = []
    for key, value in (overrides or {}).items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            faults.append(f"{where}.{key} is not a setting: {hint}known: {', '.join(known) or 'none'}")
        elif fault := known[key].fault(value):
            faults.append(f"{where}.{key} = {value!r} should be {fault}")
    if faults:
        raise InputError("\n".join(f"config: {fault}" for fault in faults))
    return {name: field.default for name, field in known.items()} | (overrides or {})
