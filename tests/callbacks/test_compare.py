"""scripts/compare.py on runs made up on the spot."""

import importlib.util
from pathlib import Path

import pytest

from grpo_jax import rundir
from grpo_jax.metrics import JsonLines

from .synthetic import config_for, evaluation_of, write_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_and_the_picture(compare, tmp_path, capsys):
    one, two = write_run(tmp_path / "one", steps=3), write_run(tmp_path / "two", steps=5)
    assert compare.main([str(one), str(two), "--out", str(tmp_path / "out.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "first", "best", "last", "reward", "steps", "completions", "time"]
    assert lines[1].split()[:4] == ["one", "10.0%", "60.0%", "60.0%"] and lines[1].split()[5:] == ["3", "36", "4", "s"]
    assert lines[2].split()[0] == "two" and lines[2].split()[5:7] == ["5", "60"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_against_steps_and_completions(compare, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.update(axes=self.axes))
    directories = [write_run(tmp_path / "a" / "run", steps=2), write_run(tmp_path / "b" / "run", steps=3)]
    names = compare.names(directories)
    assert names == [str(directory) for directory in directories]
    compare.draw([compare.load(d, n) for d, n in zip(directories, names, strict=True)], tmp_path / "x.png")
    accuracy, reward = drawn["axes"][0], drawn["axes"][5]
    assert accuracy.get_title() == "held-out accuracy"
    assert accuracy.lines[1].get_xydata().tolist() == [[0, 0.1], [3, 0.6]]
    assert reward.lines[1].get_xdata().tolist() == [12, 24, 36] and reward.get_xlabel() == "completions sampled"


def test_completions_dropped_by_dynamic_sampling_are_counted(compare, tmp_path):
    (tmp_path / rundir.CONFIG).write_text(config_for(tmp_path).to_toml())
    metrics = JsonLines(tmp_path / rundir.METRICS)
    metrics.write(evaluation_of(0, 0.1).metrics)
    for step, groups in [(1, 6.0), (2, 3.0)]:
        metrics.write({"step": step, "reward": 0.5, "dynamic_sampling/groups_sampled": groups})
    assert compare.load(tmp_path, "x").sampled == {0: 0, 1: 24, 2: 36}


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda d: None, ["nowhere"], "is no directory"),
        (lambda d: d.mkdir(), [""], "holds no metrics.jsonl"),
        (lambda d: (write_run(d) / rundir.CONFIG).unlink(), [""], "holds no config.toml"),
        (lambda d: (write_run(d) / rundir.METRICS).write_text(""), [""], "is empty"),
        (write_run, ["", "--out", "x.txt"], "pictures are .png"),
        (write_run, ["", "--out", "nowhere/x.png"], "No such file"),
    ],
)
def test_one_line_for_what_cannot_be(compare, tmp_path, capsys, monkeypatch, make, arguments, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run")
    assert compare.main([str(tmp_path / "run" / arguments[0]), *arguments[1:]]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
