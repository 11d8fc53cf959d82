"""The pages: every command in README and docs is run or dry-run, and no page is too long to read."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import yaml

from tcore import __main__ as command
from tests import planner

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
LONGEST = {"README.md": 600, "configuration.md": 10_000}  # words; a generated page may be long
PLACEHOLDERS = {"own.yaml": ("encoders", "datasets")}  # whose files must be there before anything is planned


def commands() -> dict[str, str]:
    """Every command in a block marked `sh`, with the page that it stands on."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.sub(r"\s#.*|^#.*", "", line).split("&&"):
                    if part.strip():
                        found.setdefault(re.sub(r"\s+", " ", part.strip()), str(page.relative_to(ROOT)))
    return found


COMMANDS = commands()


def succeeded(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout + run.stderr


def call(*arguments: str) -> str:
    return succeeded(subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True))


@cache
def help_of_dvc(*words: str) -> str:
    return call(str(BIN / "dvc"), *words, "--help")


@cache
def help_of_script(name: str) -> str:
    """In this process, which has torch already."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [name, "--help"])
        patch.syspath_prepend((ROOT / name).parent)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    assert not end.value.code
    return printed.getvalue()


def options(arguments: list[str]) -> list[str]:
    return [argument.partition("=")[0] for argument in arguments if re.match(r"--\w", argument)]


def check_snakemake(arguments: list[str], folder: Path) -> None:
    for absent in (("--executor", "slurm"), ("--sdm", "apptainer")):  # what only some machines have
        if absent[0] in arguments:
            place = arguments.index(absent[0])
            assert tuple(arguments[place : place + 2]) == absent
            del arguments[place : place + 2]
    if "--report" in arguments:  # of results that are not there; test_reruns.py makes one
        return
    for name in (Path(argument).name for argument in arguments if argument.endswith(".yaml")):
        if name in PLACEHOLDERS:
            for entry in yaml.safe_load((ROOT / "config" / name).read_text())["encoders"].values():
                (folder / entry["file"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / entry["file"]).touch()
            for entry in yaml.safe_load((ROOT / "config" / name).read_text())["datasets"].values():
                (folder / entry["settings"]["path"]).mkdir(parents=True, exist_ok=True)
    if not {"-s", "--snakefile"} & {*arguments}:
        arguments = ["--directory", str(folder), *arguments]
    if files := [place for place, argument in enumerate(arguments) if argument.endswith(".yaml")]:
        (folder / "seeds.yaml").write_text("seeds: [0]")  # more random seeds are more of the same
        arguments.insert(files[-1] + 1, str(folder / "seeds.yaml"))
    succeeded(planner.snakemake(ROOT, "--dry-run", "--quiet", "all", *arguments))


def check_python(arguments: list[str], folder: Path) -> None:
    script, *rest = arguments
    assert (ROOT / script).is_file(), script
    own = rest[: rest.index("--")] if "--" in rest else rest
    known = help_of_script(script)
    assert not [option for option in options(own) if option not in known]


def check_tcore(arguments: list[str], folder: Path) -> None:
    command.parser().parse_args(arguments)


def check_dvc(arguments: list[str], folder: Path) -> None:
    words = [argument for argument in arguments if not argument.startswith("-")]
    two = words[0] in ("remote", "data", "cache")
    known = help_of_dvc(*words[: 2 if two else 1])
    assert not [option for option in options(arguments) if option not in known]


def check_make(arguments: list[str], folder: Path) -> None:
    call("make", "--dry-run", *arguments)


def check_pip(arguments: list[str], folder: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
        assert name in extras


def check_pytest(arguments: list[str], folder: Path) -> None:
    for name in (argument for argument in arguments if argument.startswith("tests/")):
        assert (ROOT / name).is_file()


def check_files(arguments: list[str], folder: Path) -> None:
    for name in (a for a in arguments if a.startswith(("workflow/", "config/")) and not a.endswith(".sif")):
        assert (ROOT / name).is_file(), name


CHECKS = {
    "snakemake": check_snakemake,
    "python": check_python,
    "tcore": check_tcore,
    "dvc": check_dvc,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "apptainer": check_files,
}
AS_THEY_ARE = ("git", "source", "rsync", "mv", "cp")


@pytest.mark.parametrize("text", COMMANDS, ids=lambda text: f"{COMMANDS[text]}: {text}"[:90])
def test_a_command_runs(text, tmp_path):
    words = shlex.split(re.sub(r"\s*[>|].*", "", text))
    while "=" in words[0]:
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "unshare":
        program, arguments = "python", arguments[arguments.index("python") + 1 :]
    assert program in (*CHECKS, *AS_THEY_ARE), f"{COMMANDS[text]}: how is {program} checked?"
    if program in CHECKS:
        CHECKS[program](arguments, tmp_path)


def test_there_are_commands():
    assert {text.split()[0] for text in COMMANDS} >= {"make", "snakemake", "tcore", "dvc"}


def test_a_wrong_command_is_found(tmp_path):
    for check, text in (
        (check_snakemake, "--cores all --configfile config/paper.yaml table_10"),  # takes it for a file
        (check_python, "scripts/tools/estimate_cost.py --safe"),
        (check_dvc, "commit --forced"),
        (check_make, "dmeo"),
    ):
        with pytest.raises(AssertionError):
            check(text.split(), tmp_path)
    with pytest.raises(SystemExit):
        check_tcore(["secure", "--encoder", "e.pth"], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short(page):
    text = re.sub(r"^\|.*\n|<!--.*?-->", "", page.read_text(), flags=re.MULTILINE)  # tables are looked up
    assert len(text.split()) <= LONGEST.get(page.name, 1200)


def test_readme_in_full_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= LONGEST["README.md"]
