"""The picture, TensorBoard and W&B get every figure at its step; the table builds what a config asks for."""

import math
import sys
import time

import pytest

from grpo_jax.callbacks import tensorboard, wandb
from grpo_jax.callbacks.curves import Curves
from grpo_jax.callbacks.report import Report
from grpo_jax.callbacks.table import build
from grpo_jax.callbacks.terminal import Terminal
from grpo_jax.metrics import scalars

from .synthetic import config_for, evaluation_of, run_of, step_of, write_run


def names(config, directory) -> list[str]:
    return [type(callback).__name__ for callback in build(config, directory, print)]


def test_the_table_builds_what_the_config_asks_for(tmp_path):
    pytest.importorskip("tensorboardX")
    standard = names(config_for(tmp_path), tmp_path)
    assert {"Curves", "Report", "Terminal"} <= set(standard) and standard[-1] == "Terminal"
    assert set(names(config_for(tmp_path, report=False, tensorboard=True), tmp_path)) == (
        set(standard) - {"Report"} | {"TensorBoard"}
    )
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("log", "package", "extra"),
    [({"tensorboard": True}, "tensorboardX", "tensorboard"), ({"wandb": "p"}, "wandb", "wandb")],
)
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, log, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"log.{extra}: got .*, but {package} is not installed; .*grpo_jax\[{extra}\]"
    ):
        build(config_for(tmp_path, **log), tmp_path, print)


@pytest.mark.parametrize("make", [lambda d: Curves(), Report, lambda d: Terminal(config_for(d))])
def test_closing_what_never_began_does_nothing(make, tmp_path, capsys):
    make(tmp_path).close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_curves_are_drawn_even_when_the_run_is_interrupted(tmp_path):
    directory = write_run(tmp_path / "run", steps=2)
    curves = Curves()
    curves.on_start(run_of(directory))
    curves.close()
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_every_figure_at_its_step(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    written = {}

    class Writer:
        def __init__(self, place, purge_step, **options):
            written.update(place=place, purge_step=purge_step, points={})

        def add_scalar(self, name, value, step):
            written["points"][name, step] = value

        def close(self):
            written["closed"] = True

    callback = tensorboard.TensorBoard(tmp_path)
    callback._make = Writer
    callback.on_start(run_of(tmp_path, start=4))
    callback.on_step(step_of(5))
    callback.on_eval(evaluation_of(5, 0.5))
    callback.close()
    assert written["place"] == str(tmp_path / "tensorboard") and written["purge_step"] == 5 and written["closed"]
    expected = scalars(step_of(5).metrics) | scalars(evaluation_of(5, 0.5).metrics)
    assert written["points"] == {(name, 5): value for name, value in expected.items()} and len(expected) > 20


def test_tensorboard_files_hold_the_figures(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    callback = tensorboard.TensorBoard(tmp_path)
    callback.on_start(run_of(tmp_path))
    for number in (1, 2):
        callback.on_step(step_of(number))
    callback.close()
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    found = {}
    while data:  # length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    for number in (1, 2):
        for name, value in scalars(step_of(number).metrics).items():
            assert math.isclose(found[name, number], value, rel_tol=1e-6, abs_tol=1e-12), name


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))


def wandb_records(data: bytes):
    """Records of a .wandb file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline_holds_every_figure_with_its_step(offline, tmp_path, capfd):
    from wandb.proto import wandb_internal_pb2 as records

    directory = tmp_path / "my-run"
    directory.mkdir()
    callback = wandb.WandB("project", directory)
    callback.on_start(run_of(directory))
    callback.on_eval(evaluation_of(0, 0.1))
    callback.on_step(step_of(1))
    callback.on_end({"accuracy_last": 0.5})
    callback.close()
    assert capfd.readouterr().out == ""
    rows, run, waited = [], None, 0
    while (run is None or len(rows) < 2) and waited < 600:  # a process of W&B's own writes them
        time.sleep(0.1 if waited else 0)
        rows, waited = [], waited + 1
        for data in wandb_records(next(directory.glob("wandb/offline-run-*/*.wandb")).read_bytes()):
            record = records.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join(item.nested_key) or item.key: item.value_json for item in items})
            if record.WhichOneof("record_type") == "run":
                run = record.run
    assert run.project == "project" and run.display_name == "my-run"
    for row, expected in zip(rows, (evaluation_of(0, 0.1).metrics, step_of(1).metrics), strict=True):
        assert int(row["step"]) == expected["step"]
        for name, value in scalars(expected).items():
            assert float(row[name]) == pytest.approx(value, rel=1e-6), name


def test_wandb_without_a_login_is_one_line(tmp_path, monkeypatch):
    module = pytest.importorskip("wandb")

    def refuse(**_):
        raise module.errors.UsageError("no API key configured")

    monkeypatch.setattr(module, "init", refuse)
    callback = wandb.WandB("project", tmp_path)
    with pytest.raises(ValueError, match="log.wandb: no API key configured; log in with .* or set WANDB_MODE=offline"):
        callback.on_start(run_of(tmp_path))
    callback.close()
