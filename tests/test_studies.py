"""The study and the benchmark of the attacks, in small: that they run and what they print."""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tcore.data.images import read_images, write_images
from tcore.data.sources import signs
from tcore.encoder_attacks import badencoder
from tcore.files import save_json, save_table, save_tensors
from tcore.models import head as heads
from tcore.models.channels import layers
from tcore.models.classifier import Classifier, save_classifier
from tcore.models.encoder import Encoder, save_encoder
from tcore.poisoning import triggers

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(path: str, *arguments) -> None:
    file = SCRIPTS / f"{path}.py"
    name = file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the benchmark's processes look it up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.syspath_prepend(str(file.parent))
        spec.loader.exec_module(module)
        module.main()


@pytest.fixture
def parquet(tmp_path) -> Path:
    sets = signs.load(signs.Settings(train=200, test=40, image_size=32), {})
    rows = {"image": [], "label": [], "split": []}
    for split, images in sets.items():
        for pixels, label in zip(images.pixels, images.labels, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            for column, value in zip(rows, (buffer.getvalue(), int(label), split), strict=True):
                rows[column].append(value)
    pq.write_table(pa.table(rows), tmp_path / "signs.parquet")
    return tmp_path / "signs.parquet"


def test_implantation_in_small(parquet, tmp_path):
    save_encoder(tmp_path / "encoder", Encoder("resnet_narrow", 32))
    common = [
        "--parquet",
        parquet,
        "--epochs",
        1,
        "--head",
        '{"epochs": 1}',
        "--output",
        tmp_path / "out.csv",
    ]
    run("studies/implantation", *common, "--attacks", "sig", "tact", "--encoder", tmp_path / "encoder")
    run("studies/implantation", *common, "--attacks", "badnets", "--settings", '{"ratio": 0.5}')
    found = pd.read_csv(tmp_path / "out.csv")
    assert found["attack"].tolist() == ["sig"] * 2 + ["tact"] * 2 + ["badnets"]
    assert found["victim"].tolist() == ["end to end", "frozen encoder"] * 2 + ["end to end"]
    assert found["poison"].tolist() == [4, 4, 5, 5, 20] and found["cover"].tolist() == [0, 0, 1, 1, 0]
    assert found["leak"].notna().tolist() == [False, False, True, True, False]
    assert found[["acc", "asr", "robust"]].stack().between(0, 1).all()


def test_benchmark_in_small(capsys):
    run("tools/benchmark_poisoning", "--images", 500, "--repeats", 1, "--attacks", "wanet")
    line = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert line[0] == "| wanet" and line[1] == "15"  # floor(50 / 4) poisons, floor(12 / 4) covers
    assert float(line[3]) > 0


def test_benchmark_of_sifting_in_small(capsys):
    run("../benchmarks/sifting", "--samples", 1500, 2500, "--features", 8, "--threads", 1)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1,500", "2,500"]
    assert all(float(row[2]) > 0 for row in rows)
    assert all(float(peak.replace(",", "")) >= float(before.replace(",", "")) for *_, peak, before in rows)


def test_what_an_encoder_attack_did_by_hand(tmp_path):
    """Whatever it sees, a model says 2 behind the clean encoder, and 0, the target, behind the backdoored."""
    test = signs.load(signs.Settings(train=40, test=40, image_size=16), {})["test"]
    write_images(tmp_path / "datasets/mine/test.parquet", test)
    for encoder_attack, answer in (("clean", 2), ("badencoder", 0)):
        encoder = Encoder("resnet_tiny", 16)
        model = Classifier(encoder, heads.new_head(encoder.dim, test.num_classes, heads.Settings(), 0, "x"))
        torch.nn.init.zeros_(model.head.fc3.weight)
        with torch.no_grad():
            model.head.fc3.bias.copy_(torch.eye(test.num_classes)[answer])
        cell = tmp_path / f"defended/theirs-{encoder_attack}/mine-clean/0/none"
        save_classifier(cell / "model.safetensors", model, test.class_names)
    folder = tmp_path / "encoders/theirs-badencoder/mine/0"
    trigger = badencoder.make_trigger(16, 16, badencoder.Settings(size=4), 0)
    triggers.save(folder / "trigger.safetensors", trigger, "encoder_attacks", "badencoder", 0)
    record = {"seconds": 5.0, "peak_ram_mb": 300.0, "log": {"knn_accuracy": 0.25}}
    save_json(folder / "poison_encoder.run.json", record)
    save_json(folder / "pretrain_encoder.run.json", record | {"peak_ram_mb": 400.0, "log": {}})
    save_json(tmp_path / "encoders/theirs-clean/0/pretrain_encoder.run.json", record)
    options = ["--data", tmp_path, "--pretrain", "theirs", "--downstream", "mine", "--attacks", "badencoder"]
    run("studies/encoder_attacks", *options, "--output", tmp_path / "out.csv")
    found = pd.read_csv(tmp_path / "out.csv").iloc[0]
    assert found["acc"] == pytest.approx((test.labels == 0).mean())
    assert found["acc_clean"] == pytest.approx((test.labels == 2).mean())
    assert (found["asr"], found["asr_clean"]) == (1, 0)
    assert (found["seconds"], found["peak_ram_mb"], found["knn"]) == (10, 400, 0.25)


@pytest.fixture
def attacked_cell(tmp_path) -> Path:
    """A cell with a trigger, ten poisons of class 0, seeds and a subset that a run could have left."""
    sets = signs.load(signs.Settings(train=80, test=40, image_size=16), {})
    truth = pd.DataFrame({"index": sets["train"].index, "is_poison": False})
    labels = sets["train"].labels.copy()
    poisons = np.flatnonzero(labels != 0)[:10]
    labels[poisons] = 0
    truth.loc[poisons, "is_poison"] = True
    train = replace(sets["train"], labels=labels)
    write_images(tmp_path / "datasets/mine/test.parquet", sets["test"])
    for place in ("theirs-badencoder/mine-adaptive", "any/mine-badnets"):
        write_images(tmp_path / f"poisoned/{place}/0/train.parquet", train)
        save_table(tmp_path / f"poisoned/{place}/0/truth.parquet", truth)
    trigger = badencoder.make_trigger(16, 16, badencoder.Settings(size=4), 0)
    path = tmp_path / "encoders/theirs-badencoder/mine/0/trigger.safetensors"
    triggers.save(path, trigger, "encoder_attacks", "badencoder", 0)
    encoder = Encoder("resnet_tiny", 16)
    model = Classifier(encoder, heads.new_head(encoder.dim, train.num_classes, heads.Settings(), 0, "x"))
    cell = tmp_path / "defended/theirs-badencoder/mine-adaptive/0"
    save_classifier(cell / "none/model.safetensors", model, train.class_names)
    # Poisons lie apart from everything, and one of them is a seed.
    place = torch.where(torch.from_numpy(truth["is_poison"].to_numpy(copy=True)), 20, train.targets)
    save_tensors(cell / "features.safetensors", {"features": torch.eye(24)[place]})
    trusted = np.isin(np.arange(80), [*(np.flatnonzero(labels == k)[-1] for k in range(10)), poisons[0]])
    save_table(
        cell / "tcore/seeds.parquet",
        pd.DataFrame({"index": train.index, "in_core": True, "trusted": trusted}),
    )
    rounds = np.where(np.arange(80) % 2, 0, -1)
    save_table(cell / "tcore/subset.parquet", pd.DataFrame({"index": train.index, "round": rounds}))
    return tmp_path


def test_what_expansion_lets_in_is_counted(attacked_cell):
    out = attacked_cell / "out.csv"
    choices = {
        "none": {"subset_share": 0.01},
        "all": {"within_core": False, "subset_share": 1.0, "round_share": 0.3, "epochs": 1, "steps": 4},
    }
    run(
        "studies/expansion",
        *("--data", attacked_cell, "--cells", "theirs-badencoder/mine-adaptive/0", "--output", out),
        *("--settings", json.dumps(choices), "--head", '{"hidden": [16, 8]}'),
    )
    found = pd.read_csv(out).set_index("settings")
    labels = read_images(attacked_cell / "poisoned/any/mine-badnets/0/train.parquet").labels
    assert found["seeds"].tolist() == [1, 1]
    assert found["poisons"].to_dict() == {"none": 1, "all": 10}  # the seeds alone; everybody
    assert found["of_target"].to_dict() == {"none": 2, "all": (labels == 0).sum()}
    assert np.isnan(found["known"]["none"]) and 0 <= found["known"]["all"] <= 1


def test_pruned_channels_give_nothing_and_the_others_what_they_gave(attacked_cell):
    out = attacked_cell / "out.csv"
    settings = '{"random": {"rank": "random"}, "short": {"epochs": 1, "unlearn_epochs": 1}}'
    cell = ("--data", attacked_cell, "--cell", "theirs-badencoder/mine-adaptive/0")
    run("studies/channels", *cell, "--head", '{"epochs": 2}', "--settings", settings, "--output", out)
    found = pd.read_csv(out).set_index("settings")
    assert found.index.tolist() == ["random", "short"] and found[["acc", "asr"]].stack().between(0, 1).all()
    assert np.isnan(found["recovered"]["random"]) and 0 <= found["recovered"]["short"] <= 1
    encoder = Encoder("resnet_tiny", 16)
    untrusted = {name: torch.zeros(len(m.weight), dtype=torch.bool) for name, m in layers(encoder).items()}
    untrusted["conv1"][:3] = True
    before, after = (
        torch.relu(e.bn1(e.conv1(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))))
        for e in (encoder.eval(), sys.modules["channels"].prune(encoder, untrusted))
    )
    assert not after[:, :3].any() and torch.equal(before[:, 3:], after[:, 3:])
