"""The study and the benchmark of the attacks, in small: that they run and what they print."""

import importlib.util
import io
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tcore import triggers
from tcore.data.images import write_images
from tcore.data.sources import signs
from tcore.encoder_attacks import badencoder
from tcore.files import save_json
from tcore.models import head as heads
from tcore.models.classifier import Classifier, save_classifier
from tcore.models.encoder import Encoder, save_encoder

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(name: str, *arguments) -> None:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the benchmark's processes look it up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.syspath_prepend(str(SCRIPTS))
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
    run("study_implantation", *common, "--attacks", "sig", "tact", "--encoder", tmp_path / "encoder")
    run("study_implantation", *common, "--attacks", "badnets", "--settings", '{"ratio": 0.5}')
    found = pd.read_csv(tmp_path / "out.csv")
    assert found["attack"].tolist() == ["sig"] * 2 + ["tact"] * 2 + ["badnets"]
    assert found["victim"].tolist() == ["end to end", "frozen encoder"] * 2 + ["end to end"]
    assert found["poison"].tolist() == [4, 4, 5, 5, 20] and found["cover"].tolist() == [0, 0, 1, 1, 0]
    assert found["leak"].notna().tolist() == [False, False, True, True, False]
    assert found[["acc", "asr", "robust"]].stack().between(0, 1).all()


def test_benchmark_in_small(capsys):
    run("benchmark_poisoning", "--images", 500, "--repeats", 1, "--attacks", "wanet")
    line = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert line[0] == "| wanet" and line[1] == "15"  # floor(50 / 4) poisons, floor(12 / 4) covers
    assert float(line[3]) > 0


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
    run("study_encoder_attacks", *options, "--output", tmp_path / "out.csv")
    found = pd.read_csv(tmp_path / "out.csv").iloc[0]
    assert found["acc"] == pytest.approx((test.labels == 0).mean())
    assert found["acc_clean"] == pytest.approx((test.labels == 2).mean())
    assert (found["asr"], found["asr_clean"]) == (1, 0)
    assert (found["seconds"], found["peak_ram_mb"], found["knn"]) == (10, 400, 0.25)
