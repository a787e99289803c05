"""What a user can get wrong, and the one line that the command then prints: compared word by word.

Each row runs the command in a directory of files made for it. Nothing but that line may appear, no traceback, and the
exit status is 2 for a wrong request, 1 for a machine that failed.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from grpo_jax.algo.spec import PRESETS
from grpo_jax.cli import main
from grpo_jax.models.families import FAMILIES
from grpo_jax.rewards import REWARDS as BUILTIN
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
        time.sleep(0.5 * number)  # signals that come at the same time are one
        os.kill(os.getppid(), signal.SIGINT)
    if signals > 1:
        time.sleep(60)
    return length(prompts, completions, completion_ids)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    for name in ("model", "bert", "pickled", "mute"):
        tiny_checkpoint(place / name)
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


PRESET_NAMES = ", ".join(PRESETS)
FORMS = (
    "a .jsonl, .json, .csv or .parquet file, a directory that datasets' save_to_disk wrote, or a hub dataset "
    '"owner/name:split" or "owner/name/config:split"'
)
REQUESTS = {
    "no config file": (
        "missing.toml",
        "no config file at missing.toml. Give the path of a TOML file; configs/ holds some to start from.",
    ),
    "not TOML": (
        "broken.toml",
        "broken.toml is not TOML: Invalid value (at line 1, column 9). Configs are TOML: `key = value` under [tables].",
    ),
    "misspelt field, command": (
        "--optim.lerning_rate 1",
        "optim.lerning_rate: there is no such field; did you mean optim.learning_rate?",
    ),
    "misspelt field, file": (
        "field.toml",
        "optim.lerning_rate: there is no such field; did you mean optim.learning_rate?",
    ),
    "field of another trainer": (
        "--num_generations 8",
        "num_generations: there is no such field; did you mean rollout.num_samples?",
    ),
    "misspelt preset, command": (
        "--algorithm.preset grppo",
        f"algorithm.preset: got 'grppo', which is none of its values; did you mean grpo? It takes {PRESET_NAMES}",
    ),
    "misspelt preset, file": (
        "preset.toml",
        f"algorithm.preset: got 'dappo', which is none of its values; did you mean dapo? It takes {PRESET_NAMES}",
    ),
    "no such value": (
        "config.toml --optim.schedule step",
        "optim.schedule: got 'step', which is none of its values; use one of constant, linear, cosine",
    ),
    "not a number": (
        "config.toml --steps ten",
        "steps: got 'ten', but it must be a whole number (Rollouts to train on)",
    ),
    "out of range": (
        "config.toml --rollout.top_p 2",
        "rollout.top_p: got '2', but it must be at most 1 (Sample among the fewest tokens that hold this probability "
        "together)",
    ),
    "G = 1": (
        "config.toml --rollout.num_samples 1",
        "rollout.num_samples: got 1, and the advantage 'grpo' compares the samples of a prompt with each other. Sample "
        "at least 2, or use one of raw, batch_mean, reinforce_pp, remax, gae.",
    ),
    "a batch that does not divide": (
        "config.toml --rollout.prompts_per_step 32 --optim.minibatches 5",
        "optim.minibatches: got 5, which does not divide rollout.prompts_per_step = 32; every update must take the "
        "same share. Choose 4 or 8, or 30 or 35 prompts.",
    ),
    "weights": (
        "config.toml --reward.weights 1 2",
        "reward.weights: got 2 weights for 1 functions. Give one a function.",
    ),
    "no such model": (
        "config.toml --model.path nowhere",
        "model.path: directory 'nowhere' does not exist (looked from {here}); give the directory of a Hugging Face "
        'checkpoint, or a hub id "owner/name"',
    ),
    "a file for a model": (
        "config.toml --model.path prompts.jsonl",
        "model.path: 'prompts.jsonl' is a file; give the directory of a Hugging Face checkpoint",
    ),
    "no checkpoint": (
        "config.toml --model.path empty",
        "model.path: 'empty' is no checkpoint: it holds nothing; give the directory that holds config.json, the "
        ".safetensors files and the tokenizer's",
    ),
    "unsupported model": (
        "config.toml --model.path bert",
        "bert: config.json: got model_type 'bert'; there is no record for it; use a checkpoint of one of: "
        + ", ".join(sorted(FAMILIES)),
    ),
    "a pickle": (
        "config.toml --model.path pickled",
        "pickled: got neither model.safetensors nor model.safetensors.index.json; only safetensors is read (a pickle "
        "can run code); convert the checkpoint with transformers' save_pretrained",
    ),
    "no tokenizer": (
        "config.toml --model.path mute",
        "model directory 'mute': no tokenizer can be loaded from ['config.json', 'model.safetensors', "
        "'tokenizer_config.json'] (its vocabulary is empty); copy tokenizer.json and tokenizer_config.json into it",
    ),
    "no data": (
        "config.toml --data.train nowhere.jsonl",
        f"data.train: data file 'nowhere.jsonl' does not exist (looked from {{here}}); give {FORMS}",
    ),
    "an empty file": (
        "config.toml --data.train none.jsonl",
        "data.train: data file 'none.jsonl' is empty; it needs one JSON object a line",
    ),
    "no prompt column": (
        "config.toml --data.train question.jsonl",
        "data.train: question.jsonl, line 1: no column 'prompt', it has ['answer', 'question']; rename one or set "
        "data.prompt_column",
    ),
    "a row unlike the first": (
        "config.toml --data.eval unlike.jsonl",
        "data.eval: unlike.jsonl, line 2: columns unlike the first row's: missing ['answer'], extra ['result'], but a "
        "reward function gets whole columns; give every row the same ones (null where there is no value)",
    ),
    "a line cut short": (
        "config.toml --data.train cut.jsonl",
        "data.train: cut.jsonl, line 2: not JSON (Expecting value: line 1 column 12 (char 11)); write one JSON object, "
        'such as {{"prompt": "..."}}',
    ),
    "no chat template": (
        "config.toml --data.train chat.jsonl",
        "data.train: row 0: prompt of chat messages: the tokenizer has no chat template to write them with; use an "
        "instruct model's tokenizer, data.chat_template, or prompts that are strings",
    ),
    "prompts too long": (
        "config.toml --data.max_prompt_len 1",
        "data.max_prompt_len: got 1, but all 4 prompts are longer, the shortest 4 tokens, the longest 4; raise it",
    ),
    "completions too long": (
        "config.toml --rollout.max_new_tokens 1000",
        "rollout.max_new_tokens: got 1000, with prompts of up to 4 tokens more than the 256 positions the model was "
        "made for. Lower it, or data.max_prompt_len.",
    ),
    "no such reward": (
        "config.toml --reward.functions exact_mach",
        "reward 'exact_mach': no built-in of that name (did you mean 'exact_match'?); use one of "
        f"{', '.join(sorted(BUILTIN))}, or module:function, or path/file.py:function",
    ),
    "no reward file": (
        "config.toml --reward.functions absent.py:f",
        "reward 'absent.py:f': no file 'absent.py' under {here}; give the path from there, or all of it",
    ),
    "no such function": (
        "config.toml --reward.functions rewards.py:f",
        "reward 'rewards.py:f': rewards.py has no function 'f'; use one of those it has: Path, infinite, length, "
        "moody, raising, short, stopping, word, words",
    ),
    "files that are no run": (
        "config.toml --output_dir foreign",
        "output_dir: foreign holds files and no config.toml, so it is no run, and nothing was changed; name an empty "
        "or new directory",
    ),
    "a file for a directory": (
        "config.toml --output_dir prompts.jsonl",
        "output_dir: prompts.jsonl is a file, but a run needs a directory; name another place",
    ),
    "a run of another version": (
        "config.toml --output_dir other",
        "output_dir: other/config.toml cannot be read (batch_size: there is no such field; --help shows all fields.), "
        "so nobody knows whether its run may go on, and nothing was changed; name another output_dir, or use the "
        "version that wrote it",
    ),
    "a directory that cannot be made": (
        "config.toml --output_dir prompts.jsonl/run",
        "output_dir: prompts.jsonl/run cannot be written to (Not a directory: prompts.jsonl/run); name another place",
    ),
    "no such device": (
        "config.toml --mesh.platform tpu",
        "mesh.platform: got tpu, and jax finds {platform} only ({device}); install grpo_jax[cuda] or grpo_jax[tpu] "
        "where the hardware is there, or set mesh.platform none",
    ),
    "a mesh that does not fit": (
        "config.toml --mesh.fsdp 97",
        "mesh: got data=-1, fsdp=97, tensor=1, expert=1 for {count} device(s); the product must be the number of "
        "devices, or divide it where one size is -1; choose sizes that divide {count}",
    ),
    "a reward of the wrong length": (
        "config.toml --reward.functions rewards.py:short",
        "reward 'short': returned 7 rewards for 8 completions; return a list of 8 floats (None where it has no "
        "answer), one per completion",
    ),
    "a reward that is a string": (
        "config.toml --reward.functions rewards.py:word",
        "reward 'word': returned 'good', a str, which has no rows; return a list of 8 floats (None where it has no "
        "answer), one per completion",
    ),
    "rewards that are strings": (
        "config.toml --reward.functions rewards.py:words",
        "reward 'words', row 0: returned 'good', a str, which is no number; return a float",
    ),
    "an infinite reward": (
        "config.toml --reward.functions rewards.py:infinite",
        "reward 'infinite', row 1: returned inf, which no advantage can be computed from (float32 ends at 3.4e38); "
        "return a finite float, or None for no answer",
    ),
}


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


def contents(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


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
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a checkpoint does not fit, a line of metrics does
    try:
        status, err, _ = said(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Of the checkpoint's files the first that fails is named by its checkpoint, or, where the writer names none, not.
    written = {f"run{inside}" for inside in ("", "/checkpoints/2")} | {str(directory / "run" / "checkpoints" / "2")}
    rest = "(File too large); make room and start the same command again"
    assert status == 1 and err in [f"error: no disk space to write {place} {rest}\n{safe}" for place in written]

    (directory / "seen").unlink()
    assert said(capsys, *command)[:2] == (0, "")


def test_a_full_disk_names_the_file_of_a_line(capsys, directory, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from grpo_jax.metrics import JsonLines
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


def test_a_platform_of_the_environment_that_is_not_there(directory):
    ran = subprocess.run(
        [sys.executable, TRAIN, "config.toml"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
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


def test_a_second_ctrl_c_stops_at_once(capsys, directory):
    (directory / "signals").write_text("2")
    status, err, _ = said(capsys, "config.toml", "--reward.functions", "rewards.py:stopping", "--output_dir", "twice")
    (directory / "signals").unlink()
    assert status == 130 and err == "interrupted at once"
    assert not (directory / "twice" / "checkpoints" / "1").exists()
