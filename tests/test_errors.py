"""What a user can get wrong, and the one line that the command then prints: compared word by word.

Each row runs the command in a directory of files made for it. Nothing but that line may appear, no traceback, and the
exit status is 2 for a wrong request, 1 for a machine that failed.
"""

import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
from error_cases import REQUESTS

import grpo_jax
from grpo_jax.cli import main
from grpo_jax.config import TrainConfig
from grpo_jax.config.fields import leaves
from grpo_jax.interrupt import Interrupt
from grpo_jax.lock import LOCK, Lock
from grpo_jax.metrics import JsonLines
from grpo_jax.testing import tiny_checkpoint, tiny_config

TRAIN = Path(__file__).parent.parent / "scripts" / "train.py"
CONFIG = """
steps = 2
compilation_cache = "cache"
[model]
path = "model"
[data]
train = "prompts.jsonl"
eval = "none"
shuffle = false
[rollout]
prompts_per_step = 2
num_samples = 4
max_new_tokens = 4
[reward]
functions = ["rewards.py:length"]
[checkpoint]
every = 1
[log]
quiet = true
report = false
"""
REWARDS = """
import os, signal, time
from pathlib import Path

def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]

def short(prompts, completions, completion_ids, **columns):
    return [1.0] * (len(completions) - 1)

def word(prompts, completions, completion_ids, **columns):
    return "good"

def words(prompts, completions, completion_ids, **columns):
    return ["good"] * len(completions)

def infinite(prompts, completions, completion_ids, **columns):
    return [0.0, float("inf")] * (len(completions) // 2)

def raising(prompts, completions, completion_ids, **columns):
    return [float(answer) for answer in columns["answer"]]

def moody(prompts, completions, completion_ids, **columns):
    if Path("seen").exists():
        raise RuntimeError("not again")
    Path("seen").touch()
    return length(prompts, completions, completion_ids)

def stopping(prompts, completions, completion_ids, **columns):
    signals = int(Path("signals").read_text()) if Path("signals").exists() else 0
    for number in range(signals):
        while number and not Path("asked").exists():
            time.sleep(0.01)
        keeper = Path(f"/proc/{os.getppid()}/stat").read_text()  # of this process; the run started it
        os.kill(int(keeper.rpartition(")")[2].split()[1]), signal.SIGINT)
    if signals > 1:
        time.sleep(60)
    return length(prompts, completions, completion_ids)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    tiny_checkpoint(place / "model", num_hidden_layers=1)
    for name in ("bert", "pickled", "mute"):
        shutil.copytree(place / "model", place / name)
    (place / "bert" / "config.json").write_text(json.dumps(tiny_config() | {"model_type": "bert"}))
    (place / "pickled" / "model.safetensors").rename(place / "pickled" / "pytorch_model.bin")
    (place / "mute" / "tokenizer.json").unlink()
    (place / "empty").mkdir()
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.tex").write_text("years of work")
    (place / "other").mkdir()
    (place / "other" / "config.toml").write_text("batch_size = 3\n")
    files = {
        "prompts.jsonl": [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(4)],
        "odd.jsonl": [{"prompt": f"{a}+1=", "answer": "2" if a else "two"} for a in range(4)],
        "none.jsonl": [],
        "question.jsonl": [{"question": "1+1=", "answer": "2"}],
        "unlike.jsonl": [{"prompt": "1", "answer": "2"}, {"prompt": "1", "result": "2"}],
        "chat.jsonl": [{"prompt": [{"role": "user", "content": "1+1"}]}],
    }
    for name, rows in files.items():
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "cut.jsonl").write_text('{"prompt": "1"}\n{"prompt": ')
    (place / "config.toml").write_text(CONFIG)
    (place / "field.toml").write_text("[optim]\nlerning_rate = 1\n")
    (place / "preset.toml").write_text('[algorithm]\npreset = "dappo"\n')
    (place / "broken.toml").write_text("steps = = 1\n")
    (place / "rewards.py").write_text(REWARDS)
    yield place
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(autouse=True)
def here(directory, monkeypatch):
    monkeypatch.chdir(directory)


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard error without its last line end, standard output."""
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, err.removesuffix("\n"), out


@pytest.mark.parametrize("name", REQUESTS)
def test_a_wrong_request_is_one_line(name, capsys, directory):
    command, expected = REQUESTS[name]
    devices = jax.devices()
    words = {
        "here": directory,
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "count": len(devices),
    }
    assert said(capsys, *command.split()) == (2, f"error: {expected.format(**words)}", "")


def test_a_reward_that_raises_is_named_with_its_line_and_row(capsys, directory):
    status, err, out = said(
        capsys, "config.toml", "--reward.functions", "rewards.py:raising", "--data.train", "odd.jsonl"
    )
    line = REWARDS.splitlines().index('    return [float(answer) for answer in columns["answer"]]') + 1
    assert (status, out) == (2, "") and "\n" not in err
    assert err.startswith("error: reward 'raising', row 0: raised ValueError: could not convert string to float: 'two'")
    assert f"rewards.py, line {line}" in err


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What a full disk does, for files larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def test_a_directory_that_another_process_uses_is_refused(capsys, directory):
    (directory / "used").mkdir()
    other = Lock(directory / "used")
    with pytest.raises(ValueError, match=f"^output_dir: used is in use by process {os.getpid()} on .*; wait for it, "):
        Lock(Path("used"))
    other.close()
    Lock(directory / "used").close()
    (directory / "used" / LOCK).unlink()


def test_what_is_on_the_disk_stays_safe(capsys, directory):
    """A reward that raises in step 2, another config, a full disk, and then the end."""
    command = ["config.toml", "--reward.functions", "rewards.py:moody", "--output_dir", "run"]
    status, err, _ = said(capsys, *command)
    safe = "the record and the checkpoint of step 1 are safe in run; --output_dir run goes on there"
    assert status == 2 and err.splitlines()[1:] == [safe]
    assert err.startswith("error: reward 'moody'") and "not again" in err

    before = contents(directory / "run")
    assert said(capsys, *command, "--optim.learning_rate", "0.5", "--seed", "3") == (
        2,
        "error: output_dir: run holds a run of another config (seed: 0 -> 3; optim.learning_rate: 1e-06 -> 0.5); "
        "nothing was changed; give the recorded values to go on, or another output_dir",
        "",
    )
    assert contents(directory / "run") == before

    (directory / "seen").unlink()
    with file_size_limit(20_000):  # a checkpoint does not fit, a line of metrics does
        status, err, _ = said(capsys, *command)
    # Of the checkpoint's files the first that fails is named by its checkpoint, or, where the writer names none, not.
    written = {f"run{inside}" for inside in ("", "/checkpoints/2")} | {str(directory / "run" / "checkpoints" / "2")}
    rest = "(File too large); make room and start the same command again"
    assert status == 1 and err in [f"error: no disk space to write {place} {rest}\n{safe}" for place in written]

    (directory / "seen").unlink()
    assert said(capsys, *command)[:2] == (0, "")


def test_a_full_disk_at_the_start_costs_no_line_of_the_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "padding": "x" * 1000}) + "\n" for step in range(30)]
    path.write_text("".join([*lines[:9], "damaged\n", *lines[9:]]))  # so that cutting it short is not enough
    before = path.read_bytes()
    with file_size_limit(20_000), pytest.raises(OSError, match="File too large"):
        JsonLines(path, keep_below=25)
    assert path.read_bytes() == before


def test_a_full_disk_names_the_file_of_a_line(capsys, directory, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from grpo_jax.trainer import Trainer

    def train(self):
        JsonLines(Path("/dev/full")).write({"step": 1})

    monkeypatch.setattr(Trainer, "train", train)
    line = (
        "error: no disk space to write /dev/full (No space left on device); make room and start the same command again"
    )
    assert said(capsys, "config.toml") == (1, line, "")


def test_an_error_nobody_foresaw_is_one_line_and_with_debug_a_traceback(capsys, monkeypatch):
    from grpo_jax.trainer import Trainer

    monkeypatch.setattr(Trainer, "train", lambda self: {}["gone"])
    status, err, _ = said(capsys, "config.toml")
    assert status == 1 and "\n" not in err
    assert err.startswith("error: KeyError at cli.py:") and "'gone' (this is a bug" in err and "--debug" in err
    status, err, _ = said(capsys, "config.toml", "--debug")
    assert status == 1 and "Traceback (most recent call last)" in err and err.splitlines()[-1].startswith("error: Key")


def fails_with(error: Exception):
    def train(self):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("in a callback") from cause

    return train


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes"), "allocating 9 bytes"),
        (MemoryError(), "the host has no more"),
    ],
)
def test_memory_that_ran_out_is_one_line_with_the_fields_to_change(error, words, capsys, monkeypatch):
    from grpo_jax.trainer import Trainer

    monkeypatch.setattr(Trainer, "train", fails_with(error))
    status, err, _ = said(capsys, "config.toml")
    assert status == 1 and err.startswith("error: out of memory (") and "\n" not in err
    assert words in err and "a bug" not in err
    named = {word.strip(",") for word in err.split() if "." in word and "_" in word}
    assert {"optim.microbatch_rows", "rollout.max_new_tokens"} <= named <= set(dict(leaves(TrainConfig)))


def test_the_version(capsys):
    status, err, out = said(capsys, "--version")
    assert (status, err) == (0, "") and out.startswith(f"grpo_jax {importlib.metadata.version('grpo_jax')}, Python 3.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"steps": 1}}, "config: got a dict, which is no TrainConfig; "),
        ({"model": object()}, "model: got a object, but a run loads its model itself; "),
        (
            {"train_dataset": {"train": [{}], "test": [{}]}},
            r"train_dataset: got several datasets, \['train', 'test'\], ",
        ),
        ({"reward_funcs": 5}, "reward_funcs: got 5, which cannot be called; "),
        ({"reward_funcs": ["gsm8k", None]}, "reward_funcs: got None, which cannot be called; "),
    ],
)
def test_objects_that_other_trainers_take(arguments, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        grpo_jax.Trainer(**arguments)


def test_a_config_made_in_python_says_what_is_wrong_in_one_line():
    with pytest.raises(ValueError) as caught:
        TrainConfig(optim={"lr": 1.0})
    assert str(caught.value) == "optim.lr: there is no such field; did you mean optim.learning_rate?"


@pytest.mark.slow
def test_a_platform_of_the_environment_that_is_not_there(directory):
    ran = subprocess.run(
        [sys.executable, TRAIN, "config.toml"],
        capture_output=True,
        text=True,
        # Where XLA's compiler for TPUs is installed, others may be at work with it, and there is no cloud to ask.
        env=os.environ | {"JAX_PLATFORMS": "tpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"},
    )
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: JAX_PLATFORMS: got tpu, and jax finds no such device")


def test_a_gpu_without_its_plugin(capsys, monkeypatch):
    """JAX_PLATFORMS=cuda without the plugin is an assertion without a word in jax."""

    def fails():
        raise AssertionError

    monkeypatch.setattr(jax, "default_backend", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert said(capsys, "config.toml") == (
        2,
        "error: JAX_PLATFORMS: got cuda, and jax finds no such device; install grpo_jax[cuda] or grpo_jax[tpu] where "
        "the hardware is there, or unset JAX_PLATFORMS",
        "",
    )


def test_ctrl_c_finishes_the_step_saves_it_and_says_how_to_go_on(capsys, directory):
    (directory / "signals").write_text("1")
    words = ["config.toml", "--reward.functions", "rewards.py:stopping", "--output_dir", "stopped"]
    ran = subprocess.run([sys.executable, TRAIN, *words], capture_output=True, text=True)
    (directory / "signals").unlink()
    assert ran.stderr.splitlines() == [
        "",
        "SIGINT: the step at hand is finished and saved; once more stops at once and loses it",
        "interrupted after step 1, which is saved; to go on:",
        f"  python {TRAIN} {' '.join(words)}",
    ]
    assert ran.returncode == 128 + signal.SIGINT and (directory / "stopped" / "checkpoints" / "1").is_dir()
    assert said(capsys, *words)[:2] == (0, "")
    steps = [json.loads(line)["step"] for line in (directory / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_second_ctrl_c_stops_at_once(capsys, directory, monkeypatch):
    monkeypatch.setattr("grpo_jax.interrupt.TOGETHER", 0.0)
    asked = Interrupt._ask

    def ask(self, *signal):
        asked(self, *signal)
        (directory / "asked").touch()  # what the reward waits for with its second signal

    monkeypatch.setattr(Interrupt, "_ask", ask)
    (directory / "signals").write_text("2")
    status, err, _ = said(capsys, "config.toml", "--reward.functions", "rewards.py:stopping", "--output_dir", "twice")
    (directory / "signals").unlink()
    assert status == 130 and err.splitlines()[-1] == "interrupted at once"
    assert not (directory / "twice" / "checkpoints" / "1").exists()
