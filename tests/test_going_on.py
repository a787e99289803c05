"""What a run may go on with: fields that may change, inputs that may not, and where it begins anew."""

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import inputs, rundir
from grpo_jax.beginning import begin, open_lines
from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.cli import LESS_MEMORY
from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream
from grpo_jax.metrics import JsonLines
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import TrainState

CONFIG = {"optim": {"schedule": "constant"}, "rollout": {"prompts_per_step": 4, "num_samples": 4}}


def config_for(directory, **fields) -> TrainConfig:
    tables = {name: dict(table) for name, table in CONFIG.items()} | {"output_dir": str(directory)}
    for path, value in fields.items():
        *tops, name = path.split(".")
        table = tables
        for top in tops:
            table = table.setdefault(top, {})
        table[name] = value
    return TrainConfig.from_tables(tables)


def opened(directory, **fields) -> rundir.Opened:
    """A start that is over at once."""
    got = rundir.open_run(config_for(directory, **fields), "run")
    got.lock.close()
    return got


@pytest.fixture
def run(tmp_path):
    """The directory of a run with a checkpoint, as far as its names go."""
    directory = tmp_path / "run"
    opened(directory)
    JsonLines(directory / rundir.METRICS).write({"step": 1})
    (directory / rundir.CHECKPOINTS / "1").mkdir(parents=True)
    rundir.write_json(directory / rundir.DECIDED, {"rollout.slots": 8})
    return directory


def contents(place):
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optim.microbatch_rows", 4),
        ("model.remat", "full"),
        ("rollout.slots", 2),
        ("mesh.fsdp", 2),
        ("mesh.distributed", True),
    ],
)
def test_what_changes_numbers_by_rounding_only_may_change_and_is_said(run, field, value):
    got = opened(run, **{field: value})
    assert got.facts == () and f"{field}: " in got.warnings[0] and "by rounding only" in got.warnings[0]
    assert TrainConfig.from_toml(run / rundir.CONFIG) == config_for(run, **{field: value})
    assert not (run / rundir.DECIDED).exists(), "that was decided for other values"
    assert opened(run, **{field: value}).warnings == (), "once"


def test_all_that_the_advice_for_little_memory_sets_may_change():
    advised = set(re.findall(r"\w+\.\w+", LESS_MEMORY))
    learned = {"rollout.prompts_per_step", "rollout.num_samples", "rollout.max_new_tokens"}
    assert advised - learned == {"optim.microbatch_rows", "model.remat", "rollout.slots"} <= rundir.ROUNDING


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint.every", 3),
        ("checkpoint.keep", 5),
        ("eval.every", 7),
        ("eval.stop.patience", 2),
        ("reward.timeout_seconds", 60.0),
        ("reward.memory_limit_mb", None),
        ("reward.environment", ("JUDGE_API_KEY",)),
        ("steps", 300),
    ],
)
def test_when_a_run_looks_saves_and_gives_up_may_change(run, field, value):
    got = opened(run, **{field: value})
    assert got.warnings == () and f"going on with {field}: " in got.facts[0]
    assert (run / rundir.DECIDED).exists()


@pytest.mark.parametrize("field", ["optim.learning_rate", "rollout.temperature"])
def test_what_changes_what_is_learned_is_refused_and_nothing_is_written(run, field):
    before = contents(run)
    with pytest.raises(ValueError, match=f"holds a run of another config \\({field}: .*nothing was changed"):
        opened(run, **{field: 0.5})
    (run / rundir.METRICS).unlink()
    with pytest.raises(ValueError, match="holds a run of another config"):  # its checkpoint is there
        opened(run, **{field: 0.5})
    assert contents(run) == {path: data for path, data in before.items() if path.name != rundir.METRICS}


def test_whoever_does_not_get_the_lock_writes_nothing(tmp_path):
    directory = tmp_path / "run"
    first = rundir.open_run(config_for(directory), "run")
    before = contents(directory)
    with pytest.raises(ValueError, match="is in use by process"):
        rundir.open_run(config_for(directory, seed=9, **{"optim.learning_rate": 0.5}), "run")
    assert contents(directory) == before
    first.lock.close()


def test_a_run_that_begins_anew_keeps_what_was_recorded_and_nothing_that_was_decided(run):
    (run / rundir.CHECKPOINTS / "1").rmdir()
    lines = (run / rundir.METRICS).read_bytes()
    (run / rundir.COMPLETIONS).write_text('{"step": 1}\n')
    got = opened(run)
    assert got.facts == (f"no checkpoint yet in {run}: begins anew, what was recorded is kept in {run / 'before-1'}",)
    assert (run / "before-1" / rundir.METRICS).read_bytes() == lines
    assert {path.name for path in run.iterdir()} == {rundir.CONFIG, rundir.CHECKPOINTS, ".lock", "before-1"}
    assert opened(run).facts == (), "nothing was recorded since"
    (run / rundir.METRICS).write_text('{"step": 1}\n')
    assert "before-2" in opened(run).facts[0]


ROWS = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(6)]


def digests(place, rows=ROWS, stops=(1,), **fields) -> dict[str, str]:
    tokenizer = tiny_tokenizer()
    stream = PromptStream([PromptSet(rows, tokenizer)], seed=0, prompts_per_step=2)
    config = config_for(place, **{"reward.functions": (f"{place}/own.py:f", "exact_match"), **fields})
    return inputs.digests(config, place, stream, {"eval": PromptSet(rows[:2], tokenizer)}, stops)


@pytest.fixture
def model(tmp_path):
    files = {"config.json": '{"rope_theta": 1.0}', "tokenizer.json": "{}", "chat_template.jinja": "a", "own.py": "f=1"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_other_inputs_are_refused_by_name(model):
    recorded = json.loads(json.dumps(digests(model)))
    assert inputs.compare(recorded, digests(model)) == []
    for rows in (ROWS[::-1], ROWS[:4], [*ROWS[:5], {**ROWS[5], "answer": "7"}]):
        with pytest.raises(ValueError, match=r"something else until now: data.train \("):
            inputs.compare(recorded, digests(model, rows))
    with pytest.raises(ValueError, match=r"stop tokens \(\[1\] -> \[1, 7\]\)"):
        inputs.compare(recorded, digests(model, stops=(7, 1)))
    for name, text, subject in (
        ("tokenizer.json", '{"3": 4}', "tokenizer"),
        ("chat_template.jinja", "b", "chat template"),
        ("config.json", '{"rope_theta": 5.0}', "config.json of the model"),
    ):
        before = (model / name).read_text()
        (model / name).write_text(text)
        with pytest.raises(ValueError, match=f"until now: {subject} "):
            inputs.compare(recorded, digests(model))
        (model / name).write_text(before)
    (model / "config.json").write_text('{"transformers_version": "9", "rope_theta":1.0}')
    assert inputs.compare(recorded, digests(model)) == [], "as it says the same"


def test_a_mended_reward_is_said(model):
    recorded = digests(model)
    (model / "own.py").write_text("f = 2")
    (line,) = inputs.compare(recorded, digests(model))
    assert line.startswith(f"this run goes on with another reward {model}/own.py:f (") and "from this step on" in line
    assert inputs.compare({}, recorded) == [], "an older version recorded nothing"


class Learning:
    """Keeps and restores one array."""

    def __init__(self, value: float):
        self.state = TrainState({"x": jnp.full(2, value)}, {}, jnp.int32(0))
        self.restored: list[int] = []

    def keep_reference(self, store):
        store.save_reference(self.state.params)

    def check_reference(self, store):
        return store.check_reference()

    def restore(self, store, step):
        self.restored.append(step)
        self.state, record = store.restore(step, self.state)
        return record


def begun(directory, learning, given=None):
    store = CheckpointStore(directory, 2)
    cursors = []
    collector = SimpleNamespace(restore=cursors.append)
    return store, begin(store, learning, collector, given or {"data.train": "a"}), cursors


def test_a_run_that_begins_anew_has_the_reference_of_this_start(tmp_path):
    for value in (1.0, 2.0):
        store, beginning, cursors = begun(tmp_path, Learning(value))
        assert not beginning.resumed and beginning.record["inputs"] == {"data.train": "a"} and not cursors
        np.testing.assert_array_equal(store.restore_reference({"x": jnp.zeros(2)})["x"], value)
        store.close()


def test_a_run_goes_on_from_the_newest_sound_step_and_with_the_inputs_it_had(tmp_path):
    learning = Learning(1.0)
    store, beginning, _ = begun(tmp_path, learning)
    for step in (2, 4):
        store.save(step, learning.state, beginning.record | {"step": step, "collector": step})
    store.close()
    file = tmp_path / "checkpoints" / "4" / "record" / "metadata"
    file.write_bytes(file.read_bytes().replace(b"4", b"5"))
    with pytest.raises(ValueError, match="data.train"):
        begun(tmp_path, learning, {"data.train": "b"})
    assert learning.restored == [] and (tmp_path / "checkpoints" / "4").is_dir(), "nothing is used or changed"
    store, beginning, cursors = begun(tmp_path, learning)
    assert (beginning.record["step"], cursors, learning.restored) == (2, [2], [2])
    assert beginning.warnings[0].startswith("the checkpoint of step 4 is damaged (record/metadata has other bytes")
    (tmp_path / rundir.METRICS).write_text('{"step": 1}\nbroken\n{"step": 2}\n{"step": 3}\n')
    metrics, completions, history = open_lines(tmp_path, beginning)
    assert [row["step"] for row in history] == [1, 2] and "line 2 cannot be read" in beginning.warnings[-1]
    for each in (metrics, completions, store):
        each.close()
