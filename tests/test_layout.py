"""The layout: imports between the library's folders point downwards, a rule and its script share a name."""

import ast
import re
from pathlib import Path

from tcore.experiment import registry
from tcore.experiment.settings import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/develop/architecture.md").read_text()


def folders() -> list[str]:
    """The library's folders from top to bottom, as the page lists them."""
    table = PAGE.partition("Imports point downwards")[2].partition("\n\n\n")[0].partition("Methods are")[0]
    return [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)/`", row)
    ]


def imported(path: Path) -> set[str]:
    """The library's folders that a file imports from; its own is left out."""
    own = path.relative_to(ROOT / "tcore").parts[0]
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in nodes if node.module for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("tcore.")} - {own}


def test_the_page_names_every_folder():
    there = {path.parent.name for path in (ROOT / "tcore").glob("*/__init__.py")}
    assert set(folders()) == there and len(folders()) == len(there)


def test_imports_point_downwards():
    order = folders()
    upwards = [
        f"{path.relative_to(ROOT)} imports from {name}"
        for path in (ROOT / "tcore").glob("*/**/*.py")
        for name in imported(path) & set(order)
        if order.index(name) < order.index(path.relative_to(ROOT / "tcore").parts[0])
    ]
    assert not upwards


def test_files_at_the_root_import_no_folder():
    for path in (ROOT / "tcore").glob("*.py"):
        if path.name != "__main__.py":
            assert not imported(path) & set(folders()), path.name


def test_the_page_names_files_that_are_there():
    for name in re.findall(r"`((?:tcore|scripts|rules|workflow|config)/[\w./]+\.\w+)`", PAGE):
        assert (ROOT / name).is_file(), name


def test_every_script_belongs_to_a_rule_of_its_name():
    rules = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    for path in (ROOT / "scripts").glob("*.py"):
        assert re.search(rf"^rule {path.stem}:", rules, re.M), path.name
    called = set(re.findall(r'"\$TCORE"/scripts/(\w+)\.py', rules))
    assert called == {path.stem for path in (ROOT / "scripts").glob("*.py")}


def test_what_is_no_method_has_an_underscore():
    """Every file that is offered as a method has what its family's steps call."""
    calls = {
        "data/sources": {"load"},
        "pretraining": {"pretrain"},
        "encoder_attacks": {"make_trigger", "stamp"},
        "dataset_attacks": {"poison"},
        "defenses": {"score", "repair"},
        "paper/figures": {"measure", "draw"},
    }
    assert set(calls) | {"stages", "models"} == set(FAMILIES)
    for family, needed in calls.items():
        for name in registry.names(family):
            tree = ast.parse(registry.path(family, name).read_text())
            there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            there |= {"make_trigger", "stamp", "poison"} if name == "clean" else set()
            assert there & needed, f"{family}/{name}.py"
