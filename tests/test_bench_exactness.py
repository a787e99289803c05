"""What scripts/bench_exactness.py counts, and that it finds the differences there are and no others."""

import argparse
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_exactness.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_exactness", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_counts_up_to_its_first_difference(bench):
    assert bench.flips([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == (0, 6)
    assert bench.flips([[1, 2, 3], [4, 5, 6]], [[9, 2, 3], [4, 9, 9]]) == (2, 3)


def test_the_interval_is_wilsons(bench):
    assert bench.interval(0, 100) == pytest.approx((0.0, 0.03699), abs=1e-4)
    assert bench.interval(5, 50) == pytest.approx((0.04348, 0.21360), abs=1e-4)


def test_a_small_measurement_in_float32(bench, capsys):
    """At a vocabulary of 61 nothing flips, and the two log-probabilities are one."""
    arguments = argparse.Namespace(
        vocab=61, prompts=2, samples=2, tokens=3, rounds=1, scale=2.0, temperature=0.5, dtypes=["float32"]
    )
    bench.SHAPE |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    bench.measure(arguments, "float32")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "12 tokens" in lines[0]
    assert [line.split("|")[4].strip() for line in lines[1:]] == ["0 of 6"] + ["0 of 12"] * 4
