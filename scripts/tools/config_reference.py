"""Writes what is generated from the `Settings` of each method, from their own source: the second half of
docs/use/configuration.md, and config/schema.json, by which an editor completes and checks a configuration."""

import json
import math
import re
from pathlib import Path

import yaml

from tcore.experiment import config, grid, registry, settings
from tcore.experiment.settings import Field
from tcore.files import atomic

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "use" / "configuration.md"
SCHEMA = ROOT / "config" / "schema.json"
MARK = "<!-- Written by scripts/tools/config_reference.py from the `Settings` of each method. -->\n"
TITLES = {
    "data/sources": "Data sources: `datasets.<name>.settings`",
    "pretraining": "Pre-training",
    "encoder_attacks": "Attacks on encoders",
    "dataset_attacks": "Attacks on data sets",
    "stages": "T-Core",
    "models": "The classifier's head",
    "defenses": "Other defences",
    "paper/figures": "The paper's figures",
}
TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
MAPPING = {"type": ["object", "null"]}
NAME = "[a-z0-9_]+"


def as_yaml(value) -> str:
    """A default as one would write it in config.yaml."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def reference() -> str:
    """The tables, in Markdown."""
    parts = []
    for family, title in TITLES.items():
        methods = [name for name in registry.names(family) if name in settings.methods()]
        if methods:
            parts.append(f"## {title}\n")
        for method in methods:
            parts.append(f"### {method}\n\n| key | type | default | meaning |\n|---|---|---|---|")
            for field in settings.fields(registry.path(family, method)).values():
                cells = (f"`{field.name}`", f"`{field.type}`", f"`{as_yaml(field.default)}`", field.text)
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
            parts.append("")
    return "\n".join(parts)


def page() -> str:
    """The page: what stands above the mark is kept, what stands below is written anew."""
    return f"{PAGE.read_text().partition(MARK)[0]}{MARK}\n{reference()}"


# --- the schema: JSON Schema, draft 2020-12 --------------------------------------------------------


def one_of(names) -> dict:
    return {"enum": list(names)}


def one_or_own(names, pattern: str) -> dict:
    """One of the names, which an editor offers, or text of this pattern."""
    return {"anyOf": [one_of(names), {"type": "string", "pattern": f"^{pattern}$"}]}


def listed(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1, "uniqueItems": True}


def mapping(properties: dict, **more) -> dict:
    return MAPPING | {"properties": properties, "additionalProperties": False} | more


def three(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 3, "maxItems": 3}


def named(entry: dict) -> dict:
    """A mapping from names of the user's to entries."""
    return MAPPING | {"patternProperties": {f"^{NAME}$": entry}, "additionalProperties": False}


def architecture() -> dict:
    return one_or_own(registry.architectures(), r"[\w.]+:[\w.]+")


def single(kind: str, field: Field) -> dict:
    """What one value of a field is, or one of its tuple."""
    found: dict = {"type": TYPES[kind]}
    if field.choices:
        found["enum"] = list(field.choices)
    if (interval := field.interval) is not None:
        for end, included, word in (
            (interval.low, interval.with_low, "inimum"),
            (interval.high, interval.with_high, "aximum"),
        ):
            if abs(end) < math.inf:
                key = f"{'m' if included else 'exclusiveM'}{word}"
                found[key] = int(end) if end == int(end) else end
    return found


def of_field(field: Field) -> dict:
    kind = field.type.removesuffix(" | None")
    if kind.startswith("tuple["):
        inner, *rest = kind[6:-1].split(", ")
        found = {"type": "array", "items": single(inner, field)}
        if rest != ["..."]:
            found |= dict.fromkeys(("minItems", "maxItems"), 1 + len(rest))
    else:
        found = architecture() if field.name == "architecture" else single(kind, field)
    if kind != field.type:
        found["type"] = [found["type"], "null"]
    return found | {"default": field.default, "description": field.text}


def of_settings(path: Path) -> dict:
    return mapping({name: of_field(field) for name, field in settings.fields(path).items()})


def of_method(name: str) -> dict:
    return {"$ref": f"#/$defs/{name}"} if name in settings.methods() else mapping({})


def of_methods(names) -> dict:
    return {name: of_method(name) for name in names}


def where(key: str, found: dict[str, dict]) -> list[dict]:
    """`settings` of an entry, by the value of its `key`."""
    return [
        {
            "if": {"properties": {key: {"const": name}}, "required": [key]},
            "then": {"properties": {"settings": schema}},
        }
        for name, schema in found.items()
    ]


def meanings() -> dict[str, str]:
    """What the page's upper half says of each key."""
    rows = re.findall(r"^\| `([^`]+)` \| .* \| (.*) \|$", PAGE.read_text().partition(MARK)[0], re.MULTILINE)
    return {key: text.replace("`", "") for key, text in rows}


def described(properties: dict[str, dict], prefix: str = "") -> dict[str, dict]:
    said = meanings()
    return {
        key: schema | ({"description": said[prefix + key]} if prefix + key in said else {})
        for key, schema in properties.items()
    }


def schema() -> dict:
    """Of a configuration and of what is laid over one, so that no key at the top is required."""
    encoder_attacks = [name for name in registry.names("encoder_attacks") if name not in config.IMPLIED]
    dataset_attacks = [name for name in registry.names("dataset_attacks") if name not in config.IMPLIED]
    defenses, sources = registry.names("defenses"), registry.names("data/sources")
    pretraining = one_of(registry.names("pretraining"))
    trusted = mapping(
        described(
            {
                "source": one_of(config.TRUSTED_SOURCES),
                "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            },
            "trusted.",
        )
    )
    pair = {
        "pretrain": {"type": "string"},
        "downstream": {"type": "string"},
        "encoder_attacks": listed(one_of(encoder_attacks)),
    }
    data = {
        "source": one_of(sources),
        "settings": MAPPING,
        "encoder_target": COUNT,
        "dataset_target": COUNT,
        "attacks": mapping(of_methods(registry.names("dataset_attacks"))),
        "pretraining": pretraining,
        "stands_for": {"type": "string"},
    }
    encoder = {
        "file": {"type": "string"},
        "architecture": architecture(),
        "image_size": COUNT | {"minimum": 1},
        "mean": three({"type": "number", "minimum": 0, "maximum": 1}),
        "std": three({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "run_code": {"type": "boolean"},
    }
    variant = {
        "attack": one_of(dataset_attacks),
        "defense": one_of(["tcore", *defenses]),
        "settings": MAPPING,
        "part": one_of(settings.constants(config.DEFENSE)["PARTS"]),
        "selection": of_settings(config.SELECTION),
        "oracle": {"type": "boolean"},
        "trusted": trusted,
    }
    own = {
        "defense": of_methods(defenses) | {"tcore": mapping(of_methods(grid.STAGES))},
        "attack": of_methods(dataset_attacks),
    }
    top = {
        "seeds": listed(COUNT),
        "encoder_seed": COUNT | {"type": ["integer", "null"]},
        "precision": one_of(config.PRECISIONS),
        "pairs": listed(mapping(pair, type="object", required=["pretrain", "downstream"])),
        "scenarios": listed(one_of(grid.SCENARIOS)),
        "encoder_attacks": listed(one_of(encoder_attacks)),
        "dataset_attacks": listed(one_or_own(dataset_attacks, f"({'|'.join(dataset_attacks)})_{NAME}")),
        "defenses": listed(one_or_own([*config.BUILT_IN, *defenses], NAME)),
        "pretraining": pretraining,
        "datasets": named(
            mapping(
                described(data, "datasets.<name>."),
                allOf=where("source", of_methods(sources)),
            )
        ),
        "encoders": named(mapping(encoder)),
        "trusted": trusted,
        "variants": named(
            mapping(
                described(variant, "variants.<name>."),
                allOf=[part for key, found in own.items() for part in where(key, found)],
            )
        ),
        "methods": mapping(of_methods(name for name in settings.methods() if name not in sources)),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An experiment of T-Core",
        "description": "Written by scripts/tools/config_reference.py.",
        "type": "object",
        "properties": described(top),
        "additionalProperties": False,
        "$defs": {name: of_settings(path) for name, path in settings.methods().items()},
    }


def schema_file() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path, text in ((PAGE, page()), (SCHEMA, schema_file())):
        with atomic(path) as temporary:
            temporary.write_text(text)
