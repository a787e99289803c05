"""What a run decides from its machine: once, and the same when it goes on elsewhere."""

import json
from datetime import datetime
from pathlib import Path

import jax
import pytest

import grpo_jax
from grpo_jax import preflight, rundir
from grpo_jax.config import TrainConfig
from grpo_jax.learner.learning import layout_of
from grpo_jax.rollout import ContinuousEngine
from grpo_jax.testing import tiny_checkpoint, tiny_model

ROWS = [{"prompt": f"{a}+{b}="} for a in range(3, 9) for b in range(2, 6)]


class Device:
    """Says of its memory what a GPU says."""

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit}


def table(**more) -> TrainConfig:
    rollout = {"prompts_per_step": 4, "num_samples": 4, "max_new_tokens": 6}
    quiet = {"log": {"quiet": True}, "compilation_cache": None}
    return TrainConfig.from_tables({"rollout": rollout} | quiet | more)


def test_keys_and_values_have_what_the_rest_of_a_rollout_leaves(monkeypatch):
    model, config = tiny_model()[0], table()
    layout = layout_of(config, model, 16)
    parts = preflight.memory(model, config, layout, 16)
    room = lambda: preflight.room_for_cache(model, config, layout, 16)  # noqa: E731
    assert room() is None  # a CPU does not say
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(10**7)])
    beside = sum(parts[name] for name in ("parameters", "optimizer", "reference", "decode view"))
    assert room() == 9 * 10**6 - beside
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(beside)])
    assert room() == 0


def test_a_decision_is_kept_once_the_run_has_begun(tmp_path: Path):
    assert rundir.decided(tmp_path, {"rollout.slots": 8}) == {"rollout.slots": 8}
    assert rundir.decided(tmp_path, {"rollout.slots": 5}) == {"rollout.slots": 5}, "nothing was sampled yet"
    (tmp_path / rundir.METRICS).touch()
    assert rundir.decided(tmp_path, {"rollout.slots": 9}) == {"rollout.slots": 5}


def test_a_run_has_one_time_of_start(tmp_path: Path):
    assert rundir.recorded_start(tmp_path) is None
    now = rundir.moment(rundir.time_of_start(tmp_path))
    assert 0 <= (datetime.now() - now).total_seconds() < 3600 and rundir.recorded_start(tmp_path) == now
    rundir.write_json(tmp_path / rundir.BEGAN, {"time": "2025-01-02T03:04:05"})
    assert rundir.moment(rundir.time_of_start(tmp_path)) >= now, "nothing was sampled yet"
    rundir.write_json(tmp_path / rundir.BEGAN, {"time": "2025-01-02T03:04:05"})
    (tmp_path / rundir.METRICS).touch()
    assert rundir.moment(rundir.time_of_start(tmp_path)) == datetime(2025, 1, 2, 3, 4, 5)
    (tmp_path / rundir.BEGAN).write_text("{")
    with pytest.raises(ValueError, match="began.json is damaged, .*; delete it"):
        rundir.time_of_start(tmp_path)


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path: Path):
    assert rundir.newest_checkpoint(tmp_path) is None
    for name in ("9", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / rundir.CHECKPOINTS / name).mkdir(parents=True)
    assert rundir.newest_checkpoint(tmp_path) == 10


def test_what_a_run_computes_on_is_noted_where_it_changes(tmp_path: Path):
    note = lambda step, version: rundir.note_environment(tmp_path, step, {"jax": version, "os": "x"})  # noqa: E731
    assert [note(0, "1"), note(2, "2"), note(4, "2"), note(6, "1")] == [[], ["jax: 1 -> 2"], [], ["jax: 2 -> 1"]]
    noted = json.loads((tmp_path / rundir.ENVIRONMENT).read_text())
    assert [(row["from_step"], row["jax"]) for row in noted] == [(0, "1"), (2, "2"), (6, "1")]


def test_a_run_goes_on_with_the_slots_it_began_with(tmp_path, monkeypatch):
    checkpoint, slots = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1), []
    shapes = ContinuousEngine.shapes

    def seen(self, *call):
        slots.append(self.slots)
        return shapes(self, *call)

    monkeypatch.setattr(ContinuousEngine, "shapes", seen)

    def run(steps: int, room: int | None) -> None:
        monkeypatch.setattr("grpo_jax.trainer.room_for_cache", lambda *_: room)
        config = table(steps=steps, output_dir=str(tmp_path / "run"), checkpoint={"every": 1})
        rewards = lambda prompts, completions, completion_ids, **_: [float(len(c) % 3) for c in completions]  # noqa: E731
        grpo_jax.Trainer(model=checkpoint, reward_funcs=rewards, train_dataset=ROWS, config=config).train()

    model = tiny_model(num_hidden_layers=1)[0]
    one = 22 * sum(8 * layer.kv_heads * layer.head_dim for layer in model.spec.layers)
    run(1, one)  # on each of 8 devices
    begun = set(slots)
    assert len(begun) == 1 and begun.pop() < 16
    assert json.loads((tmp_path / "run" / rundir.DECIDED).read_text()) == {"rollout.slots": slots[0]}
    run(2, None)
    assert set(slots) == {slots[0]}
    with pytest.raises(ValueError, match="rollout.kv_memory_mb: got none"):
        monkeypatch.setattr("grpo_jax.trainer.room_for_cache", lambda *_: 1)
        other = table(steps=1, output_dir=str(tmp_path / "other"))
        grpo_jax.Trainer(model=checkpoint, reward_funcs=lambda **_: [], train_dataset=ROWS, config=other).train()
