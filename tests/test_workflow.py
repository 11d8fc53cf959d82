"""The workflow itself, in a copy of the sources: what is planned, who sees what, and one run in small."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import yaml
from snakemake.utils import update_config

from tcore.experiment import registry
from tcore.experiment.settings import FAMILIES
from tcore.running import alive, provenance
from tests import planner

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.xdist_group("workflow")  # one process, which makes the run in small once
SMOKE = ("--configfile", "config/smoke.yaml")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}


def copy_sources(folder: Path) -> Path:
    """What git tracks or would track, and nothing else."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def call(folder: Path, *command: str, **environment: str) -> str:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT | environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def snakemake(folder: Path, *arguments: str, **environment: str) -> str:
    return call(folder, sys.executable, "-m", "snakemake", *arguments, **environment)


def dry_run(folder: Path, *arguments: str) -> str:
    run = planner.snakemake(folder, "--dry-run", *arguments)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def refused(folder: Path, *arguments: str) -> str:
    """What a dry run that must fail prints."""
    run = planner.snakemake(folder, "--dry-run", *arguments)
    assert run.returncode != 0
    return run.stdout + run.stderr


def plan(folder: Path, *arguments: str) -> list[tuple[str, set[str]]]:
    """(script, every path below data/ that it reads or writes) of each job, where nothing exists yet.

    Snakemake prints the command and, because every file is to be made, every input as a reason.
    """
    return jobs_of(dry_run(folder, "--printshellcmds", *arguments))


def jobs_of(text: str) -> list[tuple[str, set[str]]]:
    blocks = re.sub(r"^Would remove .*", "", text, flags=re.MULTILINE).split("\nJob ")  # after any other job
    jobs = [block for block in blocks if "scripts/" in block]
    assert all("Missing output files" in job for job in jobs)
    return [
        (re.search(r"scripts/(\w+)\.py", job)[1], set(re.findall(r"data/[\w./-]*\w", job))) for job in jobs
    ]


def counts(jobs: list[tuple[str, set[str]]]) -> dict[str, int]:
    return dict(Counter(script for script, _ in jobs))


def stale(folder: Path, *more: str) -> dict[str, int]:
    """What a dry run would run, counted by rule; with `more` configuration files or other arguments."""
    text = dry_run(folder, "--quiet", "reason", *SMOKE, *more)
    if "Nothing to be done" in text:
        return {}
    table = text.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("sources in a folder with spaces"))


@pytest.fixture(scope="module")
def demo(sources):
    return plan(sources)


def test_the_demo_by_hand(demo):
    # Encoders: clean and attacked. Sets: clean, badnets, one with the encoder's trigger. Cells: four threats.
    assert counts(demo) == {
        "prepare_dataset": 2,
        "pretrain_encoder": 1,
        "poison_encoder": 2,
        "poison_dataset": 3,
        **dict.fromkeys(("extract_features", "train_head"), 4),
        **dict.fromkeys(("sift", "expand", "filter_channels", "bootstrap"), 4),
        **dict.fromkeys(("predict", "evaluate"), 8),
        **dict.fromkeys(("collect", "make_report"), 1),
    }


@pytest.fixture(scope="module")
def figures(sources):
    return plan(sources, "figures")


def test_the_papers_figures_by_hand(figures):
    # T2 in all six, T3 in 3 and 4, T1 in 4 and 5; figure 2 grants CT clean samples, 6 takes T-Core's seeds.
    assert counts(figures) == {
        "prepare_dataset": 2,
        "pretrain_encoder": 1,
        "poison_encoder": 2,
        "poison_dataset": 3,
        **dict.fromkeys(("extract_features", "train_head"), 3),
        **dict.fromkeys(("grant_clean", "sift"), 1),
        "measure_figure": 6 + 2 + 2,
        "draw_figure": 6,
    }


def test_one_figure_alone_and_one_that_the_grid_has_no_cell_of(sources, tmp_path):
    assert counts(plan(sources, "figure_5"))["measure_figure"] == 2
    (tmp_path / "overlay.yaml").write_text("scenarios: [T1]")
    printed = refused(sources, "--configfile", str(tmp_path / "overlay.yaml"), "--", "figure_6")
    assert "no cell of the grid is in it; it needs T2" in printed


def test_another_grid_by_hand(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("{scenarios: [T1, T3], seeds: [0, 1], defenses: [tcore]}")
    jobs = counts(plan(sources, "--configfile", str(overlay)))
    assert jobs["pretrain_encoder"] == jobs["poison_encoder"] == 2
    assert jobs["poison_dataset"] == jobs["train_head"] == jobs["sift"] == jobs["predict"] == 4


def test_seeds_may_share_a_clean_encoder(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "{scenarios: [T1, T2], seeds: [1, 2], defenses: [none], encoder_attacks: [badencoder, ctrl],"
        " encoder_seed: 1, pairs: [{pretrain: signs, downstream: signs}]}"
    )
    text = dry_run(sources, "--configfile", str(overlay))
    found = dict(re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE))
    # Seed 1's encoder serves both seeds; on CTRL's images each seed pre-trains its own.
    steps = ("pretrain_encoder", "share_encoder", "pretrain_on_poisons")
    assert [found[step] for step in steps] == ["1", "1", "2"]
    assert re.search(
        r"of another random seed \(random seed 2\)\nReason: .*signs-clean/2/.*signs-clean/1/", text
    )


ALLOWED = re.compile(
    r"data/(encoders/\w+-\w+/\w+/\d+/encoder\.safetensors"  # as handed over, not as pre-trained
    r"|poisoned/(any|\w+-\w+)/\w+-\w+/\d+/train\.parquet"
    r"|(defended|logs)/.+)"
)


@pytest.fixture(scope="module")
def every_attack(sources, tmp_path_factory):
    """A plan with attacks of both kinds on encoders, and its commands."""
    overlay = tmp_path_factory.mktemp("overlay") / "overlay.yaml"
    overlay.write_text(
        "{scenarios: [T1, T3], encoder_attacks: [badencoder, drupe, ctrl, sslbackdoor, corruptencoder],"
        " pairs: [{pretrain: signs, downstream: signs}], datasets: {signs: {pretraining: moco}}}"
    )
    text = dry_run(sources, "--printshellcmds", "--configfile", str(overlay))
    return jobs_of(text), text


def test_attacks_on_weights_and_on_images_by_hand(every_attack):
    jobs = counts(every_attack[0])
    assert jobs["poison_encoder"] == 2 and jobs["poison_images"] == 3
    assert jobs["pretrain_encoder"] == 1 + 3  # the clean encoder, for those on weights only
    assert jobs["poison_dataset"] == 1 + 5 and jobs["predict"] == 20


def test_every_pretraining_is_that_of_the_data_set(every_attack):
    commands = re.findall(r"scripts/pretrain_encoder\.py .*", every_attack[1])
    assert len(commands) == 4 and all('{"moco": ' in command for command in commands)


def test_poisoned_pretraining_images_are_the_attackers_alone(every_attack):
    readers = {
        script
        for script, paths in every_attack[0]
        for path in paths
        if re.search(r"encoders/.*/images", path)
    }
    assert readers == {"poison_images", "pretrain_encoder"}


def test_how_an_attack_on_encoders_works_is_read_from_its_file():
    for name in registry.names("encoder_attacks"):
        attack = registry.load("encoder_attacks", name)
        assert (
            registry.on_weights(name) == hasattr(attack, "poison_encoder") != hasattr(attack, "poison_images")
        )


@pytest.fixture(scope="module")
def knowing(sources, tmp_path_factory):
    """A plan with an attack on data sets that is told of the encoder, and its commands."""
    overlay = tmp_path_factory.mktemp("overlay") / "overlay.yaml"
    overlay.write_text(
        "{scenarios: [T1, T2, T1+T2], dataset_attacks: [badnets, tis_aware, tis_aware_16],"
        " variants: {tis_aware_16: {attack: tis_aware, settings: {eps: 16}}}}"
    )
    text = dry_run(sources, "--printshellcmds", "--configfile", str(overlay))
    return jobs_of(text), text


def test_an_attack_that_is_told_of_the_encoder_makes_a_set_for_each(knowing):
    jobs, commands = knowing
    # clean, badnets; tis_aware and its variant for the clean encoder and for the attacked one
    assert counts(jobs)["poison_dataset"] == 2 + 2 * 2
    assert counts(jobs)["poison_encoder"] == 2
    assert counts(jobs)["train_head"] == counts(jobs)["sift"] == 1 + 3 + 3
    attackers = [paths for script, paths in jobs if script == "poison_dataset" and "tis_aware" in str(paths)]
    for encoder in ("scenes-clean", "scenes-badencoder"):
        for name in ("tis_aware", "tis_aware_16"):
            place = f"data/poisoned/{encoder}/signs-{name}/0"
            (own,) = (paths for paths in attackers if f"{place}/train.parquet" in paths)
            assert {path for path in own if not path.startswith((place, "data/logs"))} == {
                "data/datasets/signs/train.parquet",
                f"data/encoders/{encoder}/signs/0/encoder.safetensors",
            }
    users = re.findall(r"poison_dataset\.py .*--user '(.*?)' --attack tis_aware .*\"eps\": (\d+)", commands)
    assert sorted(eps for _, eps in users) == ["16", "16", "8", "8"]
    (user,) = {json.dumps(json.loads(text)) for text, _ in users}
    (sifting,) = set(re.findall(r"scripts/sift\.py .*--settings '(.*?)'", commands))
    (training,) = set(re.findall(r"scripts/train_head\.py .*--settings '(.*?)'", commands))
    assert json.loads(user) == json.loads(sifting) | json.loads(training)


def test_a_variant_of_an_attack_has_the_last_word(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        """
        scenarios: [T2, T1+T2]
        dataset_attacks: [badnets, badnets_30]
        variants: {badnets_30: {attack: badnets, settings: {ratio: 0.3, size: 5}}}
        datasets: {signs: {attacks: {badnets: {opacity: 0.5, size: 9}}}}
        """
    )
    commands = dry_run(sources, "--printshellcmds", "--configfile", str(overlay))
    jobs = counts(jobs_of(commands))
    assert jobs["poison_dataset"] == 2 and jobs["train_head"] == 2 * 2 and jobs["predict"] == 2 * 4
    found = re.findall(r"--attack (\w+) .*--settings '(.*?)' .*--train data/poisoned/any/(\S+)", commands)
    settings = {place: (attack, json.loads(text)) for attack, text, place in found}
    attack, own = settings.pop("signs-badnets_30/0/train.parquet")
    assert attack == "badnets" and (own["ratio"], own["size"], own["opacity"]) == (0.3, 5, 0.5)
    attack, own = settings.pop("signs-badnets/0/train.parquet")
    assert attack == "badnets" and (own["ratio"], own["size"], own["opacity"]) == (0.2, 9, 0.5)
    assert not settings


def test_the_defender_sees_what_a_user_receives_and_nothing_else(demo, every_attack, knowing, figures):
    """An allow-list for all jobs that write below data/defended: no truth, trigger, test set, clean data."""
    defenders = set()
    gift = [script for script, _ in figures].index("grant_clean")  # the scenario's, which knows the truth
    for script, paths in [*demo, *every_attack[0], *knowing[0], *figures[:gift], *figures[gift + 1 :]]:
        cells = {"/".join(path.split("/")[2:5]) for path in paths if path.startswith("data/defended/")}
        own = [
            path
            for path in paths
            if path.startswith("data/defended/") and path.endswith(f"{script}.run.json")
        ]
        if own:
            defenders.add(script)
            assert {path for path in paths if not ALLOWED.fullmatch(path)} == set(), script
            assert len(cells) == 1, f"{script} reads another victim's files"
            assert len(paths) > 3
    assert defenders == {"extract_features", "train_head", "sift", "expand", "filter_channels", "bootstrap"}


def test_baselines_get_what_they_declare_and_nothing_else(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        """
        scenarios: [T2]
        defenses: [spectral, told, strip, seeded, bare]
        variants:
          told: {defense: spectral, oracle: true}
          seeded: {defense: strip, trusted: {source: seeds}}
          bare: {defense: strip, trusted: {source: none}}
        """
    )
    jobs = plan(sources, "--configfile", str(overlay))
    own = {
        re.search(r"defended/[^/]+/[^/]+/0/(\w+)/defend\.run\.json", " ".join(sorted(paths)))[1]: paths
        for script, paths in jobs
        if script == "defend"
    }
    assert set(own) == {"spectral", "told", "strip", "seeded", "bare"}
    given = {
        name: {path.split("/0/")[-1] for path in paths if "given" in path or "tcore" in path}
        for name, paths in own.items()
    }
    assert given["spectral"] == given["bare"] == set()
    assert given["told"] == {"told/given/oracle.json"}
    assert given["strip"] == {"strip/given/granted.parquet"}
    assert given["seeded"] == {"tcore/seeds.parquet"}
    for name, paths in own.items():
        assert {path for path in paths if not ALLOWED.fullmatch(path)} == set(), name
    assert counts(jobs)["grant_clean"] == counts(jobs)["reveal_rate"] == 1


def test_a_table_of_the_paper_by_hand(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        """
        seeds: [0, 1]
        pairs: [{pretrain: cifar10, downstream: svhn}, {pretrain: stl10_unlabeled, downstream: svhn}]
        dataset_attacks: [badnets, tact]
        """
    )
    arguments = ("--configfile", "config/paper.yaml", str(overlay))
    jobs = counts(plan(sources, *arguments, "--", "table_10"))
    # T2 on SVHN is published for the CIFAR-10 encoder alone: two attacks, two seeds, without and with T-Core.
    assert jobs["predict"] == jobs["evaluate"] == 2 * 2 * 2
    assert jobs["sift"] == jobs["bootstrap"] == jobs["train_head"] == jobs["poison_dataset"] == 4
    assert jobs["pretrain_encoder"] == jobs["poison_encoder"] == 2
    assert jobs["compare_tables"] == 1 and not {"defend", "collect", "make_report"} & set(jobs)
    for preview in ("preview", "data/preview/table_10.md"):
        assert set(counts(plan(sources, *arguments, "--", preview))) <= {
            "collect",
            "make_report",
            "compare_tables",
        }


def test_the_table_of_the_attacker_who_knows_sifting_by_hand(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("seeds: [0]")
    files = ("config/paper.yaml", "config/tis-aware.yaml", str(overlay))
    jobs = counts(plan(sources, "--configfile", *files, "--", "table_12"))
    # one pair and seed, four sizes of the perturbation, without and with T-Core
    assert jobs["pretrain_encoder"] == jobs["poison_encoder"] == 1
    assert jobs["poison_dataset"] == jobs["train_head"] == jobs["sift"] == jobs["bootstrap"] == 4
    assert jobs["predict"] == jobs["evaluate"] == 2 * 4 and jobs["compare_tables"] == 1


def test_a_variant_of_tcore_shares_what_comes_before_the_first_stage_that_differs(sources, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "{scenarios: [T2], defenses: [tcore, small, guessed], variants: {"
        "small: {defense: tcore, settings: {bootstrap: {rho: 0.6}}}, "
        "guessed: {defense: tcore, settings: {expand: {steps: 0}}}}}"
    )
    jobs = plan(sources, "--configfile", str(overlay))
    found = counts(jobs)
    assert found["sift"] == 1 and found["expand"] == found["filter_channels"] == 2
    assert found["bootstrap"] == found["predict"] == found["evaluate"] == 3 and "defend" not in found
    place = "data/defended/scenes-clean/signs-badnets/0"
    read = {  # by the variant whose model is made: where subset and channels come from
        "tcore": ("tcore", "tcore"),
        "small": ("tcore", "tcore"),
        "guessed": ("guessed", "guessed"),
    }
    for script, paths in jobs:
        if script in ("sift", "expand", "filter_channels", "bootstrap"):
            assert all(ALLOWED.fullmatch(path) for path in paths)
        if script == "bootstrap":
            (name,) = (name for name in read if f"{place}/{name}/model.safetensors" in paths)
            subset, channels = read.pop(name)
            assert {f"{place}/{subset}/subset.parquet", f"{place}/{channels}/channels.safetensors"} <= paths
        if script == "expand" and f"{place}/guessed/subset.parquet" in paths:
            assert f"{place}/tcore/seeds.parquet" in paths
    assert not read


def test_a_table_that_the_grid_has_no_cell_of_says_what_to_do(sources):
    assert "run with --configfile config/paper.yaml" in refused(sources, "table_10")


def test_a_retry_on_a_cluster_gets_more(sources, tmp_path):
    (tmp_path / "Snakefile").write_text(
        "rule pretrain_encoder:\n    output: 'x'\n"
        "    shell: 'echo {resources.mem_mb} {resources.runtime} >> tried; exit 1'\n"
    )
    profile = sources / "workflow/profiles/slurm"
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--workflow-profile", str(profile)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
    assert (tmp_path / "tried").read_text().split() == ["16000", "2880", "32000", "5760", "48000", "8640"]
    assert "Group job measure" in dry_run(sources, "--workflow-profile", str(profile))


@pytest.mark.parametrize(
    ("override", "message"),
    [("scenarios=[T4]", "known: clean, T1"), ("defenses=[tcores]", "did you mean 'tcore'")],
)
def test_a_bad_configuration_stops_with_a_short_message(sources, override, message):
    printed = refused(sources, "--config", override)
    assert message in printed
    assert "Traceback" not in printed and len(printed.splitlines()) < 6


# One run in small. PYTHONVERBOSE makes every step write to its log what it imports, by name too.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
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


MODULE = """
configfile: "mine.yaml"

module secure:
    snakefile: "{root}/Snakefile"
    config: config

use rule * from secure as secure_*

rule count:
    default_target: True
    input: "data/datasets/signs/train.parquet", "data/datasets/scenes/test.parquet"
    output: "counted.txt"
    shell: "ls {{input}} | wc -l > {{output}}"
"""


def test_another_workflow_uses_this_one_as_a_module(sources, tmp_path):
    config = yaml.safe_load((sources / "config/config.yaml").read_text())
    update_config(config, yaml.safe_load((sources / "config/smoke.yaml").read_text()))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    cell = "scenes-badencoder/signs-adaptive/0"
    (tmp_path / "Snakefile").write_text(MODULE.format(root=sources))
    snakemake(tmp_path, "--cores", "2")
    assert (tmp_path / "counted.txt").read_text().strip() == "2"
    assert "Nothing to be done" in dry_run(tmp_path, "--cores", "1")
    rest = jobs_of(dry_run(tmp_path, "-p", f"data/results/{cell}/tcore/metrics.parquet"))
    assert set(counts(rest)) == {
        *("pretrain_encoder", "poison_encoder", "poison_dataset", "extract_features", "train_head"),
        *("sift", "expand", "filter_channels", "bootstrap", "predict", "evaluate"),
    }
    assert not (sources / "data/datasets").exists()


def test_snakemakes_linter_finds_one_thing_and_that_is_meant(sources):
    command = [sys.executable, "-m", "snakemake", "--lint"]
    run = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    found = set(re.findall(r"^ +\* (.*):$", run.stdout + run.stderr, re.MULTILINE))
    # Input functions stand beside the rules that use them.
    assert found == {"Mixed rules and functions in same snakefile."}


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
