"""The configuration: what is refused and what the message says, and that the reference is up to date."""

import copy
import json
import runpy
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator  # Snakemake brings it

from tcore.experiment import grid, registry
from tcore.experiment.config import KEYS, OF_DATASET, OF_ENCODER, OPTIONAL, validate
from tcore.experiment.settings import resolve
from tcore.files import InputError

ROOT = Path(__file__).resolve().parents[1]
OVER_THE_PAPER = ("vit.yaml", "growth.yaml", "tis-aware.yaml", "ratios.yaml")
CONFIG = {
    "seeds": [0],
    "pairs": [{"pretrain": "scenes", "downstream": "signs"}],
    "scenarios": ["T1", "T2", "T3", "T1+T2"],
    "encoder_attacks": ["badencoder"],
    "dataset_attacks": ["badnets"],
    "defenses": ["none", "tcore"],
    "pretraining": "simclr",
    "methods": {"simclr": {"epochs": 3}},
    "datasets": {
        "scenes": {"source": "signs", "settings": {"open": True}},
        "signs": {"source": "signs", "encoder_target": 0, "dataset_target": 3},
    },
}
MISSING = object()


def changed(path: str, value) -> dict:
    """CONFIG with one entry, such as 'pairs.0.pretrain', replaced or removed."""
    config = copy.deepcopy(CONFIG)
    *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = config
    for folder in folders:
        place = place[folder]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize(
    "name", ["config.yaml", "smoke.yaml", "paper.yaml", "dataset-attacks.yaml", "defenses.yaml"]
)
def test_the_configurations_at_hand_are_valid(name):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    overlay = yaml.safe_load((ROOT / "config" / name).read_text())
    for key in overlay.keys() - {"datasets"}:
        config[key] = overlay[key]
    for data, entry in overlay.get("datasets", {}).items():
        config["datasets"][data] = config["datasets"].get(data, {}) | entry
    validate(config)


def test_what_differs_for_a_data_set_is_kept_as_given():
    own = {"tact": {"sources": [1], "cover_classes": [4]}, "sig": {}}
    resolved = validate(changed("datasets.signs.attacks", own))
    assert resolved["datasets"]["signs"]["attacks"] == own
    assert resolved["datasets"]["scenes"]["attacks"] == {}


def test_settings_are_written_out_in_full():
    resolved = validate(CONFIG)
    assert resolved["methods"]["simclr"]["epochs"] == 3
    assert resolved["methods"]["simclr"]["temperature"] == 0.5  # NT-Xent's in the encoder line of work
    assert resolved["methods"]["filter_channels"]["untrusted_share"] == 0.1  # the paper's
    assert resolved["datasets"]["scenes"]["settings"]["open"] is True
    assert resolved["datasets"]["signs"]["settings"]["open"] is False


def overlaid(*names: str) -> dict:
    """config.yaml with other files over it, as Snakemake merges them."""

    def merge(below, above):
        return {
            key: merge(below[key], above[key])
            if isinstance(below.get(key), dict) and isinstance(above.get(key), dict)
            else above.get(key, below.get(key))
            for key in {**below, **above}
        }

    files = [yaml.safe_load((ROOT / "config" / file).read_text()) for file in ("config.yaml", *names)]
    return reduce(merge, files)


def test_the_papers_17_pairs_with_the_published_settings():
    experiment = validate(overlaid("paper.yaml"))
    found = grid.cells(experiment).query("defense == 'none' and scenario == 'T1' and seed == 0")
    assert found["encoder_attack"].value_counts().to_dict() == {
        "badencoder": 6, "drupe": 6, "ctrl": 3, "sslbackdoor": 1, "corruptencoder": 1
    }  # fmt: skip
    assert len(found.drop_duplicates(["pretrain", "downstream", "encoder_attack"])) == 17
    # and lists where Settings has a tuple
    ours = {"sslbackdoor": ["source"], "head": ["hidden"], "sift": ["depths"]}
    for method, values in experiment["methods"].items():
        defaults = resolve(method)
        differs = [key for key in values if values[key] != defaults[key] and key not in ours.get(method, [])]
        assert differs == [], method


@pytest.mark.parametrize("name", [p.name for p in (ROOT / "config").glob("*.yaml")])
def test_every_overlay_is_valid(name):
    over = [path.name for path in (ROOT / "config").glob("photographs-*.yaml")]
    below = dict.fromkeys(over, "photographs.yaml") | dict.fromkeys(OVER_THE_PAPER, "paper.yaml")
    validate(overlaid(*(below[name], name) if name in below else (name,)))


def test_a_pair_and_a_data_set_may_have_their_own_choice():
    config = changed("pairs.0.encoder_attacks", ["drupe"])
    assert set(grid.cells(validate(config))["encoder_attack"]) == {"drupe", "clean"}
    assert (
        validate(changed("datasets.scenes.pretraining", "moco"))["datasets"]["scenes"]["pretraining"]
        == "moco"
    )
    with pytest.raises(
        InputError, match=r"pairs\[0\].encoder_attacks: unknown name 'drup': did you mean 'drupe'"
    ):
        validate(changed("pairs.0.encoder_attacks", ["drup"]))
    with pytest.raises(InputError, match=r"scenes.pretraining: unknown name 'mocco': did you mean 'moco'"):
        validate(changed("datasets.scenes.pretraining", "mocco"))


def test_validation_changes_nothing_given():
    given = copy.deepcopy(CONFIG)
    validate(given)
    assert given == CONFIG


def test_methods_may_be_left_out_or_empty():
    assert validate(changed("methods", MISSING))["methods"] == validate(changed("methods", None))["methods"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sceds", [0], r"sceds.*did you mean 'seeds'"),
        ("seeds", MISSING, "seeds is missing"),
        ("seeds", 0, "seeds should be a list"),
        ("seeds", [], "at least one"),
        ("seeds", [0, -1], r"seeds\[1\] = -1"),
        ("seeds", [3, 3], r"seeds\[1\] = 3 stands there twice"),
        ("seeds", [True], r"seeds\[0\] = True should be of type int"),
        ("seeds", ["0"], "should be of type int"),
        ("pairs.0.pretrain", "scene", r"pairs\[0\].pretrain.*did you mean 'scenes'"),
        ("pairs.0.pretrain", ["scenes"], r"pairs\[0\].pretrain"),
        ("pairs.0.target", 3, r"pairs\[0\].target"),
        ("pairs.0.downstream", MISSING, r"pairs\[0\].downstream is missing"),
        ("scenarios", ["T4"], "scenarios.*'T4'.*known: clean, T1"),
        ("encoder_attacks", ["badencoders"], "encoder_attacks.*did you mean 'badencoder'"),
        ("encoder_attacks", ["clean"], "encoder_attacks.*'clean'"),
        ("dataset_attacks", ["adaptive"], "dataset_attacks.*'adaptive'"),
        ("defenses", ["t_core"], "defenses.*did you mean 'tcore'"),
        ("pretraining", "augment", "unknown name .augment.: known: moco, simclr"),
        ("pretraining", "simcrl", "pretraining.*did you mean 'simclr'"),
        ("methods.simclr.epoch", 3, "methods.simclr.epoch.*did you mean 'epochs'"),
        ("methods.simclr.epochs", "3", "methods.simclr.epochs.*type int"),
        ("methods.simclr.lr", "1e-3", "methods.simclr.lr"),
        ("methods.simclr", 3, "settings of simclr are a mapping"),
        ("methods.simrcl", {}, "methods.simrcl.*did you mean 'simclr'"),
        ("methods.signs", {"train": 3}, "methods.signs"),
        ("datasets", [], "datasets should map"),
        ("datasets.My-Set", {"source": "signs"}, "My-Set.*a-z"),
        ("datasets.signs.source", "sings", "datasets.signs.source.*did you mean 'signs'"),
        ("datasets.signs.source", MISSING, "datasets.signs.source is missing"),
        ("datasets.signs.settings", {"trian": 3}, "datasets.signs.settings.*trian.*did you mean 'train'"),
        ("datasets.signs.encoder_target", MISSING, "datasets.signs.encoder_target.*class number"),
        ("datasets.signs.dataset_target", -1, "datasets.signs.dataset_target = -1"),
        ("datasets.signs.dataset_target", 0, "both 0.*different classes"),
        ("datasets.signs.attacks", [], "attacks should be a mapping"),
        ("datasets.signs.attacks", {"tatc": {}}, "datasets.signs.attacks.tatc.*did you mean 'tact'"),
        ("datasets.signs.attacks", {"badencoder": {}}, "datasets.signs.attacks.badencoder"),
        ("datasets.signs.attacks", {"tact": 3}, "settings of tact are a mapping"),
        ("datasets.signs.attacks", {"tact": {"source": [1]}}, "attacks.tact.source.*did you mean 'sources'"),
        ("datasets.signs.attacks", {"tact": {"sources": [0.5]}}, "attacks.tact.sources.*type tuple"),
    ],
)
def test_what_is_refused(path, value, message):
    with pytest.raises(InputError, match=message):
        validate(changed(path, value))


OUT_OF_RANGE = {
    "bootstrap": {"rho": 5, "lr": -1},
    "sift": {"seed_share": 3},
    "simclr": {"architecture": "resnet81", "epochs": 0},
}


def faults(config: dict) -> set[str]:
    """The keys that one error names."""
    with pytest.raises(InputError) as raised:
        validate(config)
    return {line.split(" ")[1].rstrip(":") for line in str(raised.value).splitlines()}


def test_all_settings_that_are_wrong_are_named_at_once():
    wrong = {f"methods.{method}.{key}" for method, values in OUT_OF_RANGE.items() for key in values}
    assert len(wrong) == 5 and faults(CONFIG | {"methods": OUT_OF_RANGE}) == wrong
    config = changed("datasets.signs.settings", {"train": 0, "seed": -1}) | {"methods": OUT_OF_RANGE}
    config["datasets"]["signs"]["attacks"] = {"badnets": {"ratio": 1.0}}
    config["variants"] = {
        "late": {"defense": "tcore", "settings": {"bootstrap": {"rho": 1.1}}},
        "best": {"defense": "ac", "settings": {"share": 2}, "selection": {"rule": "best", "share": -1}},
        "sig_0": {"attack": "sig", "settings": {"ratio": -0.1}},
    }
    assert faults(config) == wrong | {
        "datasets.signs.settings.signs.train",
        "datasets.signs.settings.signs.seed",
        "datasets.signs.attacks.badnets.ratio",
        "variants.late.settings.bootstrap.rho",
        "variants.best.ac.share",
        "variants.best.selection.rule",
        "variants.best.selection.share",
        "variants.sig_0.sig.ratio",
    }


def test_an_architecture_may_be_from_elsewhere():
    for name in ("vit", "timm:resnet26", "my_nets:Net"):
        own = changed("methods.simclr.architecture", name)
        assert validate(own)["methods"]["simclr"]["architecture"] == name
    with pytest.raises(InputError, match=r"methods.moco.architecture.*did you mean 'resnet18'"):
        validate(CONFIG | {"methods": {"moco": {"architecture": "resnet81"}}})
    with pytest.raises(InputError, match=r"methods.simclr.architecture = 'a:b:c': <library or module>"):
        validate(changed("methods.simclr.architecture", "a:b:c"))


def test_equal_targets_are_fine_when_the_attackers_never_meet():
    validate(changed("datasets.signs.dataset_target", 0) | {"scenarios": ["T1", "T2", "T3"]})


def test_planning_needs_no_torch():
    program = "import sys, tcore.experiment.config, tcore.running.provenance, tcore.paper.tables; "
    program += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_reference_is_up_to_date():
    written = runpy.run_path(str(ROOT / "scripts/tools/config_reference.py"))
    for file, text in (("PAGE", "page"), ("SCHEMA", "schema_file")):
        assert written[file].read_text() == written[text](), "run: python scripts/tools/config_reference.py"


SCHEMA = json.loads((ROOT / "config/schema.json").read_text())


def refused(given: dict) -> set[str]:
    """The places that the schema finds wrong."""
    return {error.json_path.removeprefix("$.") for error in Draft202012Validator(SCHEMA).iter_errors(given)}


def test_the_schema_knows_the_keys_that_the_code_knows():
    Draft202012Validator.check_schema(SCHEMA)

    def entry(key: str) -> set[str]:
        (found,) = SCHEMA["properties"][key]["patternProperties"].values()
        return set(found["properties"])

    assert set(SCHEMA["properties"]) == {*KEYS, *OPTIONAL}
    assert entry("datasets") == {"source", *OF_DATASET}
    assert entry("encoders") == {*OF_ENCODER, "run_code"}
    assert set(SCHEMA["properties"]["methods"]["properties"]) == set(validate(CONFIG)["methods"])


@pytest.mark.parametrize("name", [p.name for p in (ROOT / "config").glob("*.yaml")])
def test_the_schema_accepts_every_configuration(name):
    text = (ROOT / "config" / name).read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert refused(yaml.safe_load(text)) == set()


def test_the_schema_refuses_settings_out_of_range():
    assert refused({"methods": OUT_OF_RANGE}) == {
        f"methods.{method}.{key}" for method, values in OUT_OF_RANGE.items() for key in values
    }


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"sceds": [0]}, "$"),
        ({"seeds": [-1]}, "seeds[0]"),
        ({"scenarios": ["T4"]}, "scenarios[0]"),
        ({"pairs": [{"pretrain": "a"}]}, "pairs[0]"),
        ({"dataset_attacks": ["sgi_10"]}, "dataset_attacks[0]"),
        ({"methods": {"head": {"hidden": [8]}}}, "methods.head.hidden"),
        ({"methods": {"badencoder": {"size": 0}}}, "methods.badencoder.size"),
        ({"methods": {"sift": {"rule": "best"}}}, "methods.sift.rule"),
        ({"datasets": {"a": {"source": "signs", "settings": {"train": 0}}}}, "datasets.a.settings.train"),
        ({"datasets": {"a": {"attacks": {"sig": {"ratio": 1}}}}}, "datasets.a.attacks.sig.ratio"),
        ({"variants": {"a": {"defense": "ac", "settings": {"u": 1}}}}, "variants.a.settings"),
        ({"variants": {"a": {"defense": "tcore", "settings": {"rho": 1}}}}, "variants.a.settings"),
        (
            {"variants": {"sig_1": {"attack": "sig", "settings": {"delta": -1}}}},
            "variants.sig_1.settings.delta",
        ),
        ({"variants": {"a": {"selection": {"rule": "best"}}}}, "variants.a.selection.rule"),
        ({"encoders": {"a": {"std": [0.5, 0.5, 0]}}}, "encoders.a.std[2]"),
    ],
)
def test_what_the_schema_refuses(given, place):
    assert refused(given) == {place}


def test_the_schema_accepts_null_and_names_of_ones_own():
    given = {"badencoder": {"size": None}, "sig": {"ratio": None, "rate": 0.1}, "simclr": None}
    variants = {"mine": {"defense": "tcore", "settings": {"bootstrap": {"rho": 0.5}}}}
    lists = {"defenses": ["none", "mine"], "dataset_attacks": ["sig", "sig_10"]}
    assert refused({"methods": given, "variants": variants, "encoder_seed": None} | lists) == set()
    assert refused({"methods": {"simclr": {"architecture": "timm:resnet26"}}}) == set()


def with_variants(**variants) -> dict:
    return CONFIG | {"variants": variants, "defenses": ["none", "spectral", *variants]}


def test_a_defence_is_a_variant_of_itself_and_takes_the_methods_settings():
    config = with_variants(mild={"defense": "spectral", "settings": {"factor": 1.0}, "oracle": True})
    found = validate(config | {"methods": {"spectral": {"factor": 2.0, "cap": 0.4}}})["variants"]
    assert found["spectral"]["settings"]["factor"] == 2.0
    assert found["mild"]["settings"]["factor"] == 1.0 and found["mild"]["settings"]["cap"] == 0.4
    assert found["mild"]["oracle"] == ("poison_rate",) and found["spectral"]["oracle"] == ()
    assert found["mild"]["selection"] == {"rule": "native", "share": 0.01, "per_class": True}
    assert found["mild"]["trusted"] is None  # it declares that it needs none


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({}, "variants.mine.defense is missing"),
        ({"defense": "spectrl"}, "variants.mine.defense.*did you mean 'spectral'"),
        ({"defense": "spectral", "setting": {}}, "variants.mine.setting.*did you mean 'settings'"),
        ({"defense": "spectral", "settings": {"facto": 1.0}}, "variants.mine.spectral.facto.*'factor'"),
        ({"defense": "abl", "part": "tail"}, "variants.mine.part.*tail.*known: head, all"),
        ({"defense": "spectral", "part": "all"}, "variants.mine.part: spectral trains no network"),
        ({"defense": "spectral", "oracle": "yes"}, "variants.mine.oracle = 'yes'"),
        ({"defense": "spectral", "selection": {"rule": "best"}}, "selection.rule.*one of native, budget"),
        ({"defense": "spectral", "selection": {"share": "1"}}, "selection.share.*type float"),
        ("spectral", "variants.mine should be a mapping"),
    ],
)
def test_what_is_refused_of_a_variant(variant, message):
    with pytest.raises(InputError, match=message):
        validate(with_variants(mine=variant))


@pytest.mark.parametrize("name", ["tcore", "spectral", "My-Own"])
def test_a_variant_has_a_name_of_its_own(name):
    with pytest.raises(InputError, match=f"variants.{name}"):
        validate(with_variants(**{name: {"defense": "spectral"}}))


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        ({"source": "test"}, "trusted.source.*known: granted"),
        ({"share": 1.5}, "trusted.share = 1.5"),
        ({"shares": 0.1}, "trusted.shares.*did you mean 'share'"),
    ],
)
def test_what_is_refused_as_a_source_of_clean_samples(trusted, message):
    with pytest.raises(InputError, match=message):
        validate(CONFIG | {"trusted": trusted})


def test_variants_of_tcore_share_the_stages_before_the_first_that_differs():
    config = overlaid("config.yaml")
    config["methods"]["bootstrap"]["gamma2"] = 0.03
    variants = {
        "small": {"bootstrap": {"rho": 0.6}},
        "same": {},
        "confused": {"expand": {"steps": 0}, "bootstrap": {"rho": 0.6}},
        "as_before": {"sift": {"seed_share": 0.01}, "filter_channels": {"rank": "random"}},
    }
    config["variants"] = {
        name: {"defense": "tcore", "settings": settings} for name, settings in variants.items()
    }
    found = validate(config | {"defenses": ["tcore", *variants]})
    methods, mine = found["methods"], found["variants"]
    assert mine["small"]["settings"]["bootstrap"] == methods["bootstrap"] | {"rho": 0.6}
    assert methods["bootstrap"]["gamma2"] == 0.03 and mine["small"]["settings"]["sift"] == methods["sift"]
    assert {name: mine[name]["own"] for name in variants} == {
        "small": ("bootstrap",),
        "same": ("bootstrap",),
        "confused": ("expand", "filter_channels", "bootstrap"),
        "as_before": ("filter_channels", "bootstrap"),  # of sift it says what is the default
    }


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"trusted": {"share": 0.2}}, r"variants.mine.trusted: of T-Core only the stages' settings vary"),
        (
            {"settings": {"rho": 0.6}},
            r"variants.mine.settings.rho: unknown name 'rho': .*known: sift, expand",
        ),
        ({"settings": {"bootstrap": {"alpha": 0.6}}}, "settings.bootstrap.alpha is not a setting"),
    ],
)
def test_what_is_refused_of_a_variant_of_tcore(variant, message):
    with pytest.raises(InputError, match=message):
        validate(overlaid("config.yaml") | {"variants": {"mine": {"defense": "tcore"} | variant}})


@pytest.mark.parametrize("seed", [-1, "0", 0.5, True])
def test_a_seed_of_the_shared_encoder_is_a_number(seed):
    with pytest.raises(InputError, match=r"encoder_seed = .*: a number, 0 or more"):
        validate(CONFIG | {"encoder_seed": seed})


def test_one_data_set_stands_for_one_of_the_papers():
    both = {name: entry | {"stands_for": "gtsrb"} for name, entry in CONFIG["datasets"].items()}
    assert len(both) > 1
    with pytest.raises(InputError, match="stands_for: gtsrb"):
        validate(CONFIG | {"datasets": both})


def with_attacks(**variants) -> dict:
    return CONFIG | {"variants": variants, "dataset_attacks": ["sig", *variants]}


def test_a_variant_of_an_attack_is_an_attack_of_the_grid():
    config = with_attacks(sig_10={"attack": "sig", "settings": {"ratio": 0.1}})
    config["defenses"] = ["none", "mild"]
    config["variants"]["mild"] = {"defense": "spectral", "settings": {"factor": 1.0}}
    found = validate(config)
    assert found["attack_variants"] == {"sig_10": {"ratio": 0.1}}  # the rest follows for each data set
    assert "sig_10" not in found["variants"] and found["variants"]["mild"]["defense"] == "spectral"
    cells = grid.cells(found).query("scenario == 'T2'")
    assert set(cells["dataset_attack"]) == {"sig", "sig_10"} and len(cells) == 4


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("sig_10", {"attack": "sgi", "settings": {}}, "variants.sig_10.attack.*did you mean 'sig'"),
        ("sig_10", {"attack": "badencoder", "settings": {}}, "variants.sig_10.attack: unknown name"),
        ("sig_10", {"attack": "sig"}, "variants.sig_10.settings is missing"),
        ("sig_10", {"attack": "sig", "settings": {"rato": 1}}, "sig_10.sig.rato.*did you mean 'ratio'"),
        ("sig_10", {"attack": "sig", "settings": {"ratio": "1"}}, "variants.sig_10.sig.ratio.*type float"),
        ("sig_10", {"attack": "sig", "settings": 3}, "settings of sig are a mapping"),
        ("sig_10", {"attack": "sig", "settings": {}, "trusted": {}}, "sig_10.trusted.*known: attack"),
        ("sig_10", {"attack": "sig", "defense": "ac"}, "variants.sig_10.defense"),
        ("weak", {"attack": "sig", "settings": {}}, "variants.weak: a variant of sig is called sig_<more>"),
        ("sig", {"attack": "sig", "settings": {}}, "variants.sig: a variant"),
        ("sig_", {"attack": "sig", "settings": {}}, "variants.sig_: a variant"),
        ("sig_A", {"attack": "sig", "settings": {}}, "variants.sig_A: a variant"),
        ("badnets_10", {"attack": "sig", "settings": {}}, "variants.badnets_10: a variant of sig"),
        ("adaptive_10", {"attack": "adaptive", "settings": {}}, "adaptive comes with its scenarios"),
    ],
)
def test_what_is_refused_of_a_variant_of_an_attack(name, variant, message):
    with pytest.raises(InputError, match=message):
        validate(with_attacks(**{name: variant}))


def test_an_attack_whose_name_begins_with_anothers_keeps_its_variants(monkeypatch):
    """`registry.base` takes the longest name that fits, so a variant belongs to one attack alone."""
    names = registry.names
    monkeypatch.setattr(
        registry, "names", lambda family: names(family) + ["sig_sharp"] * (family == "dataset_attacks")
    )
    registry.base.cache_clear()
    try:
        assert registry.base("dataset_attacks", "sig_sharp") == "sig_sharp"
        assert registry.base("dataset_attacks", "sig_sharp_10") == "sig_sharp"
        assert registry.base("dataset_attacks", "sig_sharper") == "sig"
        for name in ("sig_sharp", "sig_sharp_10"):
            with pytest.raises(InputError, match=f"variants.{name}: a variant of sig"):
                validate(with_attacks(**{name: {"attack": "sig", "settings": {}}}))
    finally:
        registry.base.cache_clear()
