"""Digests of code: what a step runs, reduced to what it means.

Snakemake sees neither edits in imported modules nor that an edit was a comment. Every rule
therefore carries a digest of its script, of the methods that its wildcards name and of all
our modules that these import, taken over syntax trees without comments and docstrings.
Methods must be named because they are imported by name at run time, where no scan can see it.
"""

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def code(script: str, *methods: str, files: tuple[str, ...] = ()) -> str:
    """16 hex digits for `scripts/<script>.py`, methods such as 'dataset_attacks/badnets' and other files."""
    roots = [ROOT / "scripts" / f"{script}.py", *(ROOT / "tcore" / f"{method}.py" for method in methods)]
    parts = [f"{path.relative_to(ROOT)} {_scan(path)[0]}" for path in closure(roots)]
    parts += [f"{name} {hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}" for name in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def listing(folder: str | Path) -> str:
    """16 hex digits for the names, sizes and modification times of all files below a folder."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            state = path.stat() if path.exists() else path.lstat()
            found.append(f"{path.relative_to(folder)}\0{state.st_size}\0{state.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def closure(roots: Iterable[Path]) -> list[Path]:
    """The roots and every file of ours that they import, directly or not, sorted."""
    found: set[Path] = set()
    waiting = list(roots)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(_scan(path)[1])
    return sorted(found)


@cache
def _scan(path: Path) -> tuple[str, tuple[Path, ...]]:
    """The digest of one file and the files of ours that it imports, wherever the statement stands."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    imports = tuple({file for name in set(_imported(nodes, path)) for file in _files(name)})
    for node in nodes:
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(_text(tree).encode()).hexdigest(), imports


def _text(node) -> str:
    """A syntax tree as text, the same for all versions of Python, unlike `ast.dump` and `ast.unparse`."""
    if isinstance(node, ast.JoinedStr):  # Python 3.12 may end it with an empty constant
        return f"JoinedStr({_text([part for part in node.values if getattr(part, 'value', None) != ''])})"
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({','.join(f'{name}={_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)


def _imported(nodes: list[ast.AST], path: Path) -> Iterator[str]:
    """Dotted names that the nodes of a file import; `from a import b` may mean the module a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The files of ours that run when a dotted name is imported: the packages on the way and the module."""
    parts = name.split(".")
    stems = [ROOT.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    candidates = [path for stem in stems for path in (stem.with_suffix(".py"), stem / "__init__.py")]
    return tuple(path for path in candidates if path.is_file())
