"""Writes the generated half of docs/use/configuration.md: every method's settings, from their own source."""

from pathlib import Path

import yaml

from tcore.experiment import registry, settings
from tcore.files import atomic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use" / "configuration.md"
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


if __name__ == "__main__":
    text = page()
    with atomic(PAGE) as temporary:
        temporary.write_text(text)
