"""One run in small: what it leaves, which change makes which step run again, and what else can be done."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from tcore.experiment import registry
from tcore.experiment.settings import FAMILIES
from tcore.running import alive, provenance
from tests.test_workflow import call, copy_sources, dry_run, snakemake

BIN = Path(sys.executable).parent
SMOKE = ("--configfile", "config/smoke.yaml")


def stale(folder: Path, *more: str) -> dict[str, int]:
    """What a dry run would run, counted by rule; with `more` configuration files or other arguments."""
    text = dry_run(folder, "--quiet", "reason", *SMOKE, *more)
    if "Nothing to be done" in text:
        return {}
    table = text.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """PYTHONVERBOSE makes every step write to its log what it imports, by name too."""
    folder = copy_sources(tmp_path_factory.mktemp("finished"))
    snakemake(folder, "--cores", "2", *SMOKE, PYTHONVERBOSE="1")
    return folder


def test_the_run_leaves_a_report_and_is_then_up_to_date(finished):
    assert (finished / "data/results/report.html").stat().st_size > 0
    assert set(json.loads((finished / "data/results/summary.json").read_text())) == {"T3"}
    assert not list((finished / "data").rglob("*.part"))
    assert stale(finished) == {}


def test_records_name_configuration_and_commit(finished):
    for name in ("data/datasets/signs/prepare_dataset", "data/results/make_report"):
        record = json.loads((finished / f"{name}.run.json").read_text())
        assert record["config"] == "config/config.yaml config/smoke.yaml"
        assert record["commit"] is None  # this copy is no checkout
    assert (
        "Configuration config/config.yaml + config/smoke.yaml"
        in (finished / "data/results/report.html").read_text()
    )


def test_what_people_look_at_is_in_snakemakes_own_report(finished):
    snakemake(finished, "--report", "all.html", *SMOKE)
    page = (finished / "all.html").read_text()
    assert "report.html" in page and "table.csv" in page and "One self-contained page" in page
    assert stale(finished) == {}


def test_another_folder_holds_the_data_and_the_same_makes_it_stale(finished, tmp_path):
    for name in ("data", ".snakemake"):
        shutil.copytree(finished / name, tmp_path / name)
    there = ("--snakefile", str(finished / "Snakefile"), "--directory", str(tmp_path))
    module = finished / "tcore/stages/bootstrap.py"
    text = module.read_text()
    away = finished / "data-away"
    (finished / "data").rename(away)
    try:
        assert stale(finished, *there) == {}
        module.write_text(f"{text}\n# a comment\n")
        assert stale(finished, *there) == {}
        module.write_text(f"{text}\nANOTHER = 1\n")
        assert stale(finished, *there) == {"bootstrap": 1} | measured(1)
        module.write_text(text)
        (tmp_path / "seeds.yaml").write_text("seeds: [0, 1]")
        assert stale(finished, str(tmp_path / "seeds.yaml"), *there)["sift"] == 1
        (tmp_path / "data/results/report.html").unlink()
        assert stale(finished, *there) == {"make_report": 1, "all": 1}
        snakemake(finished, "--cores", "1", *SMOKE, *there)
        assert stale(finished, *there) == {}
        assert not (finished / "data/results").exists()
    finally:
        module.write_text(text)
        shutil.rmtree(finished / "data", ignore_errors=True)
        away.rename(finished / "data")


def test_steps_run_without_snakemake_and_it_then_has_nothing_to_do(finished, tmp_path):
    folder = copy_sources(tmp_path)
    (folder / "plan.txt").write_text(dry_run(folder, "-p", *SMOKE))
    run_steps = (sys.executable, "scripts/tools/run_steps.py", "plan.txt", "--jobs", "2")
    call(folder, *run_steps, PYTHONPATH=str(folder))
    assert stale(folder) == {}
    # Threads differ, and with them the last digits of what is trained; not what is made of them.
    cell = "scenes-badencoder/signs-adaptive/0"
    for name in (f"poisoned/{cell}/train.parquet", f"poisoned/{cell}/truth.parquet"):
        assert (folder / "data" / name).read_bytes() == (finished / "data" / name).read_bytes()
    mine, theirs = (
        pd.read_parquet(f / f"data/results/{cell}/tcore/metrics.parquet") for f in (folder, finished)
    )
    assert set(mine["metric"]) == set(theirs["metric"]) and set(mine["stage"]) == set(theirs["stage"])
    times = {file: file.stat().st_mtime_ns for file in folder.glob("data/results/**/*") if file.is_file()}
    call(folder, *run_steps, PYTHONPATH=str(folder))
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_a_preview_of_what_is_there_while_another_run_goes_on(finished):
    metrics = finished / "data/results/scenes-badencoder/signs-adaptive/0/strip/metrics.parquet"
    away, locks = metrics.with_name("away"), finished / ".snakemake/locks"
    another = alive.enter(finished / ".snakemake")
    preview = ("--cores", "1", "--nolock", "preview", *SMOKE)
    snakemake(finished, *preview)
    table = finished / "data/preview/table.csv"
    assert table.read_bytes() == (finished / "data/results/table.csv").read_bytes()
    metrics.rename(away)
    locks.mkdir(exist_ok=True)
    lock = locks / "0.output.lock"
    lock.write_text("data/results/results.parquet\n")
    try:
        snakemake(finished, *preview)
        assert len(table.read_text().splitlines()) == 1 + 2
        assert "2 of 3 cells of the grid are there." in (finished / "data/preview/report.html").read_text()
        locked = [sys.executable, "-m", "snakemake", "--cores", "1", "--forcerun", "collect", *SMOKE]
        run = subprocess.run(locked, cwd=finished, capture_output=True, text=True)
        assert run.returncode != 0 and "cannot be locked" in run.stdout + run.stderr
    finally:
        away.rename(metrics)
        another.close()
    lock.write_text("data/results/results.parquet\n")  # of a run that was killed
    assert stale(finished) == {} and not lock.exists()


def test_an_edit_makes_stale_what_depends_on_it_and_nothing_else(finished):
    module = finished / "tcore/stages/sift.py"
    text = module.read_text()
    try:
        module.write_text(f"{text}\n# a comment\n")
        assert stale(finished) == {}
        module.write_text(f"{text}\nANOTHER = 1\n")
        after = (
            "sift",
            "expand",
            "filter_channels",
            "bootstrap",
            "predict",
            "evaluate",
            "collect",
            "make_report",
            "all",
        )
        assert stale(finished) == dict.fromkeys(after, 1)  # of two predictions, T-Core's only
    finally:
        module.write_text(text)


# What each victim costs after its encoder and its data set are there, and what comes at the end of a run.
USER = dict.fromkeys(("extract_features", "train_head"), 1)
STAGES = dict.fromkeys(("sift", "expand", "filter_channels", "bootstrap"), 1)
STRIP = dict.fromkeys(("detect", "score_inputs"), 1)
END = dict.fromkeys(("collect", "make_report", "all"), 1)


def measured(cells: int) -> dict[str, int]:
    return {"predict": cells, "evaluate": cells} | END


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        # settings: only what uses them
        ("methods: {strip: {overlays: 5}}", STRIP | measured(1)),
        ("methods: {sift: {neighbours: 9}}", STAGES | measured(1)),
        ("methods: {head: {epochs: 3}}", {"train_head": 1} | STAGES | STRIP | measured(3)),
        ("trusted: {share: 0.2}", {"grant_clean": 1} | STRIP | measured(1)),
        (
            "datasets: {signs: {encoder_target: 4}}",
            {"poison_encoder": 1, "poison_dataset_adaptively": 1, "grant_clean": 1}
            | (USER | STAGES | STRIP | measured(3)),
        ),
        # settings that no cell of the grid uses, and a default written out
        ("methods: {badnets: {size: 5}}", {}),
        ("datasets: {signs: {dataset_target: 5}}", {}),
        ("methods: {sift: {block: 256}}", {}),
        # a longer grid: only the new cells
        ("defenses: [none, tcore, strip, ac]", {"detect": 1} | measured(1)),
        (
            "scenarios: [T1, T3]",
            {"poison_dataset": 1, "grant_clean": 1} | USER | STAGES | STRIP | measured(3),
        ),
        (
            "seeds: [0, 1]",
            {"pretrain_encoder": 1, "poison_encoder": 1, "poison_dataset_adaptively": 1, "grant_clean": 1}
            | (USER | STAGES | STRIP | measured(3)),
        ),
        (
            "{scenarios: [T3, T1+T2], dataset_attacks: [sig_10],"
            " variants: {sig_10: {attack: sig, settings: {ratio: 0.1}}}}",
            {"poison_dataset": 1, "grant_clean": 1} | USER | STAGES | STRIP | measured(3),
        ),
        (
            "{scenarios: [T3, T1+T2], dataset_attacks: [tis_aware]}",
            {"poison_dataset_knowingly": 1, "grant_clean": 1} | USER | STAGES | STRIP | measured(3),
        ),
        ("variants: {sig_10: {attack: sig, settings: {ratio: 0.1}}}", {}),
        # a shorter one
        ("defenses: [none, tcore]", END),
    ],
)
def test_a_configuration_makes_stale_what_depends_on_the_difference(finished, tmp_path, overlay, expected):
    (tmp_path / "overlay.yaml").write_text(overlay)
    assert stale(finished, str(tmp_path / "overlay.yaml")) == expected


def test_comments_and_formatting_make_nothing_stale(finished):
    edits = {
        "scripts/predict.py": lambda text: text.replace("def main", "\n\n\n# a comment\ndef main"),
        "tcore/models/head.py": lambda text: re.sub(r'^"""', '"""Once more: ', text),
        "tcore/defenses/strip.py": lambda text: text.replace("(", "( ").replace("= ", "=  "),
        "tcore/encoder_attacks/badencoder.py": lambda text: text.replace("  # ", "  # hmm, "),
        "rules/user.smk": lambda text: text.replace("\nrule", "\n# a comment\n\nrule"),
        "config/smoke.yaml": lambda text: text.replace("sift: {", "sift:   {  ") + "\n# a comment\n",
        "config/config.yaml": lambda text: text.replace("seeds: [0]", "seeds:\n  - 0"),
        "docs/develop/architecture.md": lambda text: text + "more",
    }
    before = {name: (finished / name).read_text() for name in edits}
    try:
        for name, edit in edits.items():
            assert edit(before[name]) != before[name], name
            (finished / name).write_text(edit(before[name]))
        assert stale(finished) == {}
    finally:
        for name, text in before.items():
            (finished / name).write_text(text)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("tcore/poisoning/triggers.py", None),  # everything but pre-training and what only sees images
        ("scripts/grant_clean.py", {"grant_clean": 1} | STRIP | measured(1)),
        ("tcore/defenses/strip.py", STRIP | measured(1)),
        ("tcore/encoder_attacks/badencoder.py", None),
        ("tcore/report/report.py", {"make_report": 1, "all": 1}),
        ("tcore/dataset_attacks/wanet.py", {}),  # of no cell
        ("workflow/style.css", {"make_report": 1, "all": 1}),
        ("config/paper.csv", {}),
    ],
)
def test_code_makes_stale_the_steps_that_run_it(finished, file, expected):
    text = (finished / file).read_text()
    (finished / file).write_text(f"{text}\nANOTHER = 1\n")
    try:
        found = stale(finished)
    finally:
        (finished / file).write_text(text)
    if expected is None:
        assert found["poison_encoder"] == found["bootstrap"] == 1 and found["predict"] == 3
        assert not {"prepare_dataset", "pretrain_encoder"} & set(found)
    else:
        assert found == expected


def test_a_new_method_runs_its_own_cells_only(finished, tmp_path):
    defense, attack = (finished / f"tcore/{family}/another.py" for family in ("defenses", "dataset_attacks"))
    shutil.copy(defense.with_name("ac.py"), defense)
    shutil.copy(attack.with_name("blended.py"), attack)
    overlay = tmp_path / "overlay.yaml"
    try:
        assert stale(finished) == {}  # nobody has asked for them
        overlay.write_text("defenses: [none, tcore, strip, another]")
        assert stale(finished, str(overlay)) == {"detect": 1} | measured(1)
        overlay.write_text("{scenarios: [T3, T1+T2], dataset_attacks: [another]}")
        new = {"poison_dataset": 1, "grant_clean": 1} | USER | STAGES | STRIP | measured(3)
        assert stale(finished, str(overlay)) == new
    finally:
        defense.unlink()
        attack.unlink()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("datasets/signs/test.parquet", {"score_inputs": 1} | measured(3)),
        (
            "poisoned/scenes-badencoder/signs-adaptive/0/truth.parquet",
            {"grant_clean": 1} | STRIP | {"predict": 1, "evaluate": 3} | END,
        ),
    ],
)
def test_data_that_change_make_stale_what_reads_them(finished, file, expected):
    path = finished / "data" / file
    before, times = path.read_bytes(), path.stat()
    try:
        path.touch()
        assert stale(finished) == {}  # a new time of change is not a change
        path.write_bytes(before + b"\0")
        assert stale(finished) == expected
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_variant_of_an_attack_follows_its_own_settings_and_the_attacks_code(finished, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    target = (str(overlay), "--", "data/poisoned/any/signs-sig_10/0/train.parquet")

    def after(more="", ten=0.1, twenty=0.2) -> dict[str, int]:
        overlay.write_text(
            f"""
            scenarios: [T2]
            dataset_attacks: [sig_10, sig_20]
            variants:
              sig_10: {{attack: sig, settings: {{ratio: {ten}}}}}
              sig_20: {{attack: sig, settings: {{ratio: {twenty}}}}}
            {more}
            """
        )
        return stale(finished, *target)

    again = {"poison_dataset": 1}
    assert after() == again
    snakemake(finished, "--cores", "1", *SMOKE, *target, PYTHONVERBOSE="1")
    assert after() == after(twenty=0.3) == {}
    assert after(ten=0.15) == again
    assert after("methods: {sig: {delta: 20.0}}") == again
    assert after("datasets: {signs: {attacks: {sig: {delta: 20.0}}}}") == again
    # the variant says otherwise
    assert after("methods: {sig: {ratio: 0.3}}") == {}
    assert after("datasets: {signs: {attacks: {sig: {ratio: 0.3}}}}") == {}
    for name, expected in (("sig", again), ("wanet", {})):
        file = finished / f"tcore/dataset_attacks/{name}.py"
        text = file.read_text()
        try:
            file.write_text(f"{text}\nANOTHER = 1\n")
            assert after() == expected
        finally:
            file.write_text(text)


def test_a_digest_covers_what_its_step_imports(finished):
    """Methods are imported by name, so rules must name their files: here Python says which ones they were."""
    methods = {
        f"tcore.{family.replace('/', '.')}.{name}": f"{family}/{name}"
        for family in FAMILIES
        for name in registry.names(family)
    }
    snakemake(finished, "--cores", "2", "figure_3", *SMOKE, PYTHONVERBOSE="1")
    attacks = ("encoder_attacks/badencoder", "dataset_attacks/adaptive")  # a rule may name more than it needs
    page = ("workflow/report.html.jinja", "workflow/style.css")
    checked = set()
    for file in (path for path in (finished / ".snakemake/metadata").rglob("*") if path.is_file()):
        record = json.loads(file.read_text())
        script = re.search(r"scripts/(\w+)\.py", record["code"])[1]
        log = (finished / record["log"][0]).read_text()
        imported = set(re.findall(r"^import '(tcore[\w.]*)'", log, re.MULTILINE))
        named = [methods[name] for name in imported & set(methods)]
        files = page if script == "make_report" else ()
        digests = {
            provenance.code(script, *named, *more, files=files)
            for n in range(3)
            for more in combinations(attacks, n)
        }
        assert any(f"'{digest}'" in record["params"] for digest in digests), (script, named)
        checked.add(script)
    assert {"pretrain_encoder", "poison_encoder", "poison_dataset", "sift", "predict"} <= checked
    assert {"measure_figure", "draw_figure"} <= checked


def test_a_clone_with_pulled_data_is_up_to_date(finished, tmp_path):
    dvc = str(BIN / "dvc")
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")
    call(finished, "git", "init", "--quiet")
    call(finished, dvc, "commit", "--force", "--quiet")
    call(finished, dvc, "remote", "add", "--default", "store", str(tmp_path / "store"))
    call(finished, dvc, "push", "--quiet")
    call(finished, "git", "add", ".")
    call(finished, *git, "commit", "--quiet", "--message", "results")
    tracked = call(finished, "git", "ls-files", "data").split()
    assert tracked == ["data/README.md"]
    call(tmp_path, "git", "clone", "--quiet", str(finished), "clone")
    clone = tmp_path / "clone"
    call(clone, dvc, "pull", "--quiet")
    assert stale(clone) == {}
    with (clone / "tcore/stages/bootstrap.py").open("a") as file:
        file.write("\nANOTHER = 1\n")
    assert set(stale(clone)) == {"bootstrap", "predict", "evaluate", "collect", "make_report", "all"}
