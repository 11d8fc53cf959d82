"""The workflow itself, in a copy of the sources: what is planned, and who sees what."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from tcore.experiment import registry
from tests import planner

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
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
