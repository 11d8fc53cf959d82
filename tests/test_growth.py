"""No stage's work grows faster than the data: operations counted at n and 2n."""

import importlib.util
import math
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "growth.py"
spec = importlib.util.spec_from_file_location("growth", FILE)
growth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(growth)

# Exact neighbours are those of all pairs: two products of n x n. Its memory is linear (test_sift.py).
QUADRATIC = ("sift",)


@pytest.mark.parametrize("stage", growth.STAGES)
def test_work_grows_no_faster_than_the_data(stage):
    one, two = (growth.operations(stage, n, 16) for n in (100, 200))
    assert 0.7 < math.log2(two / one) <= (2.05 if stage in QUADRATIC else 1.3)


def test_the_benchmark_in_small(capsys, monkeypatch):
    arguments = ["growth", "--samples", "100", "200", "--stages", "train_head", "predict"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(growth.multiprocessing, "get_context", lambda kind: Here)
    growth.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows if row[1] != "exponent"] == [
        [stage, n] for stage in ("train_head", "predict") for n in ("100", "200")
    ]
    assert [float(row[4]) for row in rows if row[1] == "exponent"] == pytest.approx([1, 1], abs=0.05)


class Here:
    """A pool that is this process."""

    def __init__(self, processes: int):
        pass

    Pool = classmethod(lambda cls, processes: cls(processes))
    apply = staticmethod(lambda function, arguments: function(*arguments))
    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *error: None  # noqa: E731
