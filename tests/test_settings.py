"""Settings: read from the source they are what the import gives, the paper's where it states them."""

import dataclasses
import importlib
import inspect
import math
from collections import Counter

import pytest

from tcore.experiment import registry, settings
from tcore.experiment.config import SELECTION
from tcore.experiment.settings import FAMILIES, Field, fields, methods, resolve
from tcore.files import InputError

EVERY = [(method, field) for method, path in methods().items() for field in fields(path).values()]


def imported(method: str):
    parts = methods()[method].relative_to(registry.ROOT).with_suffix("").parts
    return importlib.import_module(".".join(("tcore", *parts))).Settings


@pytest.mark.parametrize("method", methods())
def test_what_is_read_from_the_source_is_what_python_makes_of_it(method):
    made = imported(method)()
    assert resolve(method) == dataclasses.asdict(made)
    assert {n: f.type for n, f in fields(methods()[method]).items()} == {
        field.name: inspect.formatannotation(field.type) for field in dataclasses.fields(made)
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, None)


def test_every_number_states_its_range_and_every_default_is_in_it():
    every = [*EVERY, *(("_selection", field) for field in fields(SELECTION).values())]
    numbers = [(method, field) for method, field in every if "int" in field.type or "float" in field.type]
    assert len(numbers) > 200
    assert [f"{method}.{field.name}: {field.text}" for method, field in numbers if not field.interval] == []
    assert [f"{method}.{field.name}" for method, field in every if field.fault(field.default)] == []


@pytest.mark.parametrize(
    ("place", "constant", "used"),
    [
        ("stages/sift", "RULES", {"sift": "rule"}),
        ("stages/expand", "WRONG_LABELS", {"expand": "wrong_label"}),
        ("stages/filter_channels", "RANKS", {"filter_channels": "rank"}),
        ("stages/bootstrap", "GUIDANCE", {"bootstrap": "guidance"}),
        ("defenses/abl", "KEPT_BY", {"abl": "kept_by"}),
        ("defenses/spectre", "SUSPECTS", {"spectre": "suspects"}),
        ("defenses/_training", "SCOPES", dict.fromkeys(("ft_sam", "i_bau", "clp"), "scope")),
        ("defenses/_interface", "LAYERS", dict.fromkeys(("ac", "asset", "spectral", "spectre"), "layer")),
        ("encoder_attacks/_unlabelled", "SOURCES", dict.fromkeys(("ctrl", "sslbackdoor"), "source")),
    ],
)
def test_the_choices_are_those_of_the_code(place, constant, used):
    known = settings.constants(registry.ROOT / f"{place}.py")[constant]
    assert {method: fields(methods()[method])[key].choices for method, key in used.items()} == dict.fromkeys(
        used, known
    )


def test_which_settings_have_choices():
    """Those of the test above; other text is free. So a choice that is not in the notation is noticed."""
    free = {"architecture", "reference_file", "image", "mark", "marks", "test_marks", "path", "classes"}
    free |= {"image_column", "label_column", "split_column"}
    text = {field.name: field.choices for _, field in EVERY if "str" in field.type}
    assert {name for name, choices in text.items() if not choices} == free


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("a share, in [0, 1] [paper]", [0, 0.5, 1], [-1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf]),
        ("a share, in (0, 1]", [1e-9, 1], [0, 1.5]),
        ("a share, in [0, 1); 0: none", [0, 0.999], [1, -0.1]),
        ("a share, in (0, 1)", [0.5], [0, 1]),
        ("a rate, in (0, inf) [code]", [1e-9, 1e30], [0, math.inf, math.nan]),
        ("in [-1, 1e-3]", [-1, 1e-3], [-1.1, 2e-3]),
        ("anything, in (-inf, inf)", [-1e30, 0], [math.inf, -math.inf, math.nan]),
        ("in 1/255, nothing said [T-Core, table 12: 4, 8]", [-7, 7], [math.inf, math.nan]),
    ],
)
def test_the_ends_of_an_interval(text, inside, outside):
    field = Field("x", "float", 0.5, text)
    assert [value for value in inside if field.fault(value)] == []
    assert [value for value in outside if not field.fault(value)] == []
    listed = Field("x", "tuple[float, ...]", (), text)
    assert not listed.fault(inside) and listed.fault([*inside, outside[0]]) and not listed.fault(())


def test_an_interval_is_shown_as_it_is_written():
    for method, field in EVERY:
        assert field.interval is None or f"in {field.interval}" in field.text, f"{method}.{field.name}"


def test_choices_end_where_the_list_ends():
    field = Field("x", "str", "a", "what is cut, one of a, b_2, c: one, or two, or three [paper: a]")
    assert field.choices == ("a", "b_2", "c")
    assert not field.fault("b_2") and field.fault("one") == "one of a, b_2, c"
    assert Field("x", "int", 1, "one of a, b").choices == ()


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(InputError) as raised:
        resolve("bootstrap", {"rho": 5, "epochs": 1, "lr": math.nan, "epoch": 3, "batch": "8"})
    assert str(raised.value).splitlines() == [
        "config: methods.bootstrap.rho = 5 should be in [0, 1]",
        "config: methods.bootstrap.lr = nan should be in (0, inf)",
        "config: methods.bootstrap.epoch is not a setting: did you mean 'epochs'? known: "
        + ", ".join(fields(methods()["bootstrap"])),
        "config: methods.bootstrap.batch = '8' should be of type int",
    ]


@pytest.mark.parametrize(("method", "field"), EVERY, ids=[f"{m}.{f.name}" for m, f in EVERY])
def test_every_setting_says_what_it_means_on_its_own_line(method, field):
    assert field.text, f"{methods()[method].name}: Settings.{field.name} has no comment on its line"
    assert resolve(method, {field.name: field.default})[field.name] == field.default  # of its own type


def test_names_of_methods_with_settings_are_unique():
    # config.yaml knows methods by name alone, so a second one would hide the first
    names = [
        name for family in FAMILIES for name in registry.names(family) if fields(registry.path(family, name))
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_defaults_are_the_papers_where_it_states_them():
    # T-Core, IEEE S&P 2025, appendix A; where the paper contradicts itself the default says so in its comment
    stated = {
        "sift": {"seed_share": 0.01, "neighbours": 50},
        "expand": {"subset_share": 0.1, "round_share": 0.05},
        "filter_channels": {"untrusted_share": 0.1, "stop_accuracy": 0.2, "epochs": 120, "lr": 0.01},
        "bootstrap": {"rounds_class": 10, "rounds_all": 10, "gamma1": 0.02, "gamma3": 0.05, "rho": 0.9},
        # BadEncoder, IEEE S&P 2022, and its code
        "simclr": {"epochs": 1000, "batch": 256, "lr": 1e-3, "weight_decay": 1e-6, "temperature": 0.5},
        "head": {"hidden": (512, 256), "lr": 1e-4, "batch": 64, "epochs": 500},
        "badencoder": {"epochs": 200, "batch": 256, "lr": 1e-3, "lambda1": 1.0, "lambda2": 1.0},
        # DRUPE, S&P 2024; CTRL, ICCV 2023; SSLBackdoor, CVPR 2022; CorruptEncoder, CVPR 2024: their code
        "drupe": {"references": 3, "shadow": 10_000, "epochs": 120, "lr": 0.05, "effective": -0.96},
        "ctrl": {"rate": 0.01, "window": 32, "bands": (15, 31), "magnitude": 100.0},
        "sslbackdoor": {"share": 0.5, "place": (0.25, 0.75), "place_test": (0.1, 0.9)},
        "corruptencoder": {"references": 3, "rate": 0.005, "support": 0.0, "support_images": 5},
        "moco": {"epochs": 200, "batch": 256, "lr": 0.06, "temperature": 0.2, "queue": 65_536},
        # the detectors' papers or released code
        "ac": {"dimensions": 10, "share": 0.35},
        "spectral": {"factor": 1.5, "cap": 0.5},
        "spectre": {"alpha": 4.0, "factor": 1.5, "dimensions": 100},
        "strip": {"overlays": 64, "alpha": 0.5, "fpr": 0.05},
        "scale_up": {"factors": (3, 5, 7, 9, 11), "threshold": 0.5},
        "ibd_psc": {"omega": 1.5, "models": 5, "xi": 0.6, "threshold": 0.9},
        "ct": {"ratios": (0.5, 0.2, 0.04, 0.02, 0.01), "batch": 32, "ratio_sure": 2.0, "ratio_top": 1.5},
        "asset": {"inner_steps": 100, "batch": 512, "lr": 1e-4, "outlyingness": 2.0, "level": 1e-6},
        "meta_sift": {"sifters": 5, "batch": 128, "lr": 1e-4, "v_lr": 5e-4, "keep": 0.02},
    }
    for method, values in stated.items():
        assert {name: resolve(method)[name] for name in values} == values, method


def test_overrides_replace_defaults_and_nothing_else():
    assert resolve("sift", {"neighbours": 7}) == resolve("sift") | {"neighbours": 7}
    assert resolve("clean") == {}
    assert resolve("simclr", {"lr": 1})["lr"] == 1  # an int where a float belongs
    assert resolve("head", {"hidden": [8, 4]})["hidden"] == [8, 4]  # YAML has no tuples
    assert resolve("badencoder", {"size": None})["size"] is None


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        ("sift", "neighbour", 7, r"methods\.sift\.neighbour is not a setting: did you mean 'neighbours'\?"),
        ("sift", "zzz", 7, r"methods\.sift\.zzz is not a setting: known: seed_share, "),
        ("clean", "zzz", 7, r"methods\.clean\.zzz is not a setting: known: none"),
        ("sift", "neighbours", 7.0, r"methods\.sift\.neighbours = 7\.0 should be of type int"),
        ("sift", "neighbours", True, "should be of type int"),
        ("sift", "seed_share", True, "should be of type float"),
        ("sift", "seed_share", "0.1", "should be of type float"),
        ("head", "normalize", 1, "should be of type bool"),
        ("head", "hidden", [8, 4.5], r"should be of type tuple\[int, int\]"),
        ("head", "hidden", 8, r"should be of type tuple\[int, int\]"),
        ("head", "hidden", [8], r"should be of type tuple\[int, int\]"),
        ("badencoder", "size", "8", r"should be of type int \| None"),
        ("badencoder", "size", 0, r"methods\.badencoder\.size = 0 should be in \[1, inf\)"),
        ("head", "hidden", [8, 0], r"methods\.head\.hidden = \[8, 0\] should be in \[1, inf\)"),
        ("sift", "depths", [0.5, 1], r"methods\.sift\.depths = \[0\.5, 1\] should be in \[0, 1\)"),
        ("sift", "rule", "best", r"methods\.sift\.rule = 'best' should be one of invariance, random"),
    ],
)
def test_overrides_that_do_not_fit_are_named(method, key, value, message):
    with pytest.raises(InputError, match=message):
        resolve(method, {key: value})


def test_the_comment_is_read_from_the_fields_own_line(tmp_path):
    source = tmp_path / "method.py"
    source.write_text(
        "class Settings:\n"
        "    a: int = 3  # an # in a comment\n"
        "    # not this line\n"
        "    b: tuple[int, int] = (1, 2)\n"
        "    c: str | None = None  # last\n"
        "raise RuntimeError('imported')\n"
    )
    found = settings.fields(source)
    assert [(f.name, f.type, f.default, f.text) for f in found.values()] == [
        ("a", "int", 3, "an # in a comment"),
        ("b", "tuple[int, int]", (1, 2), ""),
        ("c", "str | None", None, "last"),
    ]
