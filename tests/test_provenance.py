"""Digests of code, on a small project with a script, a method and what they import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tcore.running import provenance, record

FILES = {
    "scripts/step.py": "from tcore.common import f\n\n\ndef main():\n    import tcore.late\n",
    "scripts/other.py": "import json\n",
    "tcore/__init__.py": "",
    "tcore/common.py": '"""Doc."""\n\n\ndef f(x):  # comment\n    """Doc."""\n    return x + 1\n',
    "tcore/late.py": "from tcore.pack import inner\n",
    "tcore/pack/__init__.py": "",
    "tcore/pack/inner.py": "from . import sibling\n",
    "tcore/pack/sibling.py": "VALUE = 1\n",
    "tcore/methods/__init__.py": "",
    "tcore/methods/alpha.py": "VALUE = 1\n",
    "tcore/methods/beta.py": "VALUE = 2\n",
}


def forget():
    for known in (provenance.code, provenance._scan, provenance._files):
        known.cache_clear()


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def changes(project):
    """Whether an edit of one file changes the digest of `step` with the method alpha."""

    def changed(name, text):
        before = provenance.code("step", "methods/alpha")
        (project / name).write_text(text)
        forget()
        return provenance.code("step", "methods/alpha") != before

    forget()
    yield changed
    forget()


def test_the_closure_by_hand(project):
    found = provenance.closure([project / "scripts/step.py"])
    names = [str(path.relative_to(project)) for path in found]
    assert names == [
        "scripts/step.py",
        "tcore/__init__.py",
        "tcore/common.py",
        "tcore/late.py",
        "tcore/pack/__init__.py",
        "tcore/pack/inner.py",
        "tcore/pack/sibling.py",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x + 1\n",
        '"""Another."""\n\n\ndef f(x):\n    """More."""\n    # and more\n\n    return (x + 1)\n',
    ],
)
def test_comments_docstrings_and_layout_mean_nothing(changes, text):
    assert not changes("tcore/common.py", text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scripts/step.py", FILES["scripts/step.py"] + "X = 1\n"),
        ("tcore/common.py", "def f(x):\n    return x + 2\n"),
        ("tcore/common.py", "def f(x):\n    return 'a string that is returned' and x + 1\n"),
        ("tcore/pack/sibling.py", "VALUE = 2\n"),
        ("tcore/pack/__init__.py", "X = 1\n"),
        ("tcore/methods/alpha.py", "VALUE = 2\n"),
    ],
)
def test_what_the_step_runs_counts(changes, name, text):
    assert changes(name, text)


@pytest.mark.parametrize("name", ["scripts/other.py", "tcore/methods/beta.py", "tcore/unused.py"])
def test_what_the_step_does_not_run_does_not_count(changes, name):
    assert not changes(name, "VALUE = 3\n")


def test_methods_differ_and_a_digest_is_repeatable(project):
    alpha, beta = (provenance.code("step", f"methods/{name}") for name in ("alpha", "beta"))
    assert alpha != beta
    assert alpha == provenance.code("step", "methods/alpha") and len(alpha) == 16


def test_the_closure_holds_what_python_loads():
    """On our own code, in a fresh process."""
    root = provenance.ROOT
    program = "import sys, tcore.experiment.config; print(*(m.__file__ for m in list(sys.modules.values())"
    program += " if m.__name__.startswith('tcore')))"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    closure = provenance.closure([root / "tcore/experiment/config.py"])
    assert {Path(file) for file in loaded} <= set(closure)
    assert root / "tcore/experiment/registry.py" in closure


DIGESTS = """
import sys
from pathlib import Path
from tcore.running import provenance
print([provenance._scan(path)[0] for path in sorted(Path("tcore").rglob("*.py"))])
print(provenance._scan(Path(sys.argv[1]))[0])
"""
HARD = """def f(x, y="", *z): return f"a{{b}}{x!r:>{y}} c" "d" f"{z}", type(x), b"e" b"f", 1_000j\n"""


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_another_version_of_python_finds_the_same_digests(version, tmp_path):
    (tmp_path / "hard.py").write_text(HARD)

    def call(python, *arguments):
        environment = os.environ | {"PYENV_VERSION": version}  # where pyenv stands in for it
        options = {"cwd": provenance.ROOT, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([python, *arguments], **options)

    python = shutil.which(f"python{version}")
    if python is None or call(python, "--version").returncode:
        pytest.skip(f"there is no Python {version}")
    found = [call(each, "-c", DIGESTS, str(tmp_path / "hard.py")) for each in (sys.executable, python)]
    assert [run.returncode for run in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) > 64 * 100


def test_an_empty_argument_is_an_argument(changes):
    (provenance.ROOT / "tcore/common.py").write_text("def f(x):\n    return x()\n")
    assert changes("tcore/common.py", "def f(x):\n    return x('')\n")


def test_other_files_count_by_their_bytes(project):
    (project / "page.html").write_text("one")
    before = provenance.code("step", files=("page.html",))
    provenance.code.cache_clear()
    assert before == provenance.code("step", files=("page.html",)) != provenance.code("step")
    provenance.code.cache_clear()
    (project / "page.html").write_text("two")
    assert before != provenance.code("step", files=("page.html",))


def test_a_record_names_the_commit_and_whether_files_differ_from_it():
    command = ["git", "-C", str(provenance.ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("no checkout")
    found = record.commit()
    assert len(found.removesuffix("-dirty")) >= 10 and head.stdout.startswith(found.removesuffix("-dirty"))
