"""The configs of the repository: each loads, its header tells the truth, and it trains with a tiny model of its kind
on a file in its dataset's format."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import grpo_jax
from grpo_jax.cli import QUICKSTART, parse
from grpo_jax.config import TrainConfig, read_toml
from grpo_jax.data import held_out_prompts, load_tokenizer, training_prompts
from grpo_jax.scoring import pool_from
from grpo_jax.testing import tiny_checkpoint, tiny_tokenizer

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.toml"))}

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{% if enable_thinking is false %} ...{% endif %}"
)
"""A chat template that reads what Qwen's read."""
GSM8K = [{"question": f"what is {n} and {n}?", "answer": f"it is <<{n}+{n}>>\n#### {2 * n}"} for n in range(4)]
DAPO = [{"prompt": f"find {n} + 1.", "solution": str(n + 1), "data_source": "x", "ability": "math"} for n in range(4)]
MATH500 = [{"problem": f"find {n} + 1.", "answer": str(n + 1)} for n in range(4)]
COUNTDOWN = [{"target": n + 3, "nums": [n, 1, 2]} for n in range(4)]
OWN = [{"prompt": f"{n} + 1", "solution": str(n + 1)} for n in range(4)]
QUICK = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
KINDS = {
    "countdown_qwen2.5_base": ("qwen2", COUNTDOWN, COUNTDOWN),
    "dapo_math": ("qwen2", DAPO, {"dapo": DAPO, "math500": MATH500}),
    "gsm8k_qwen2.5_0.5b": ("qwen2", GSM8K, GSM8K),
    "gsm8k_qwen2.5_0.5b_ppo": ("qwen2", GSM8K, GSM8K),
    "gsm8k_qwen2.5_1.5b": ("qwen2", GSM8K, GSM8K),
    "gsm8k_qwen2.5_1.5b_lora": ("qwen2", GSM8K, GSM8K),
    "gsm8k_qwen3_0.6b": ("qwen3", GSM8K, GSM8K),
    "own_data": ("qwen2", OWN, OWN),
    "quickstart": ("qwen2", QUICK, QUICK),
}
"""The model_type of a config's model, and rows with the columns of its training and evaluation data."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, one_device):
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = tiny_checkpoint(
                tmp_path_factory.mktemp(model_type),
                model_type=model_type,
                head_dim=8,
                num_hidden_layers=1,
                max_position_embeddings=1024,
            )
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = CHAT
            tokenizer.save_pretrained(made[model_type])
        return made[model_type]

    return make


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def tiny(name, checkpoint, directory, tmp_path):
    """The config's own tables, with other places and smaller sizes."""
    _, train, held_out = KINDS[name]
    tables = read_toml(CONFIGS[name])
    named = held_out if isinstance(held_out, dict) else {"eval": held_out}
    files = {key: write(tmp_path / f"{key}.jsonl", rows) for key, rows in named.items()}
    over = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "data": {"train": write(tmp_path / "train.jsonl", train), "max_prompt_len": 512},
        "rollout": {"prompts_per_step": 4, "num_samples": 2, "max_new_tokens": 4},
        "optim": {"microbatch_rows": 2},
        "eval": {"every": None, "samples": 0},
        "log": {"quiet": True, "report": False},
    }
    if "overlong_buffer_len" in tables["algorithm"]:
        over["algorithm"] = {"overlong_buffer_len": 2}
    for table, fields in over.items():
        tables[table] = tables.get(table, {}) | fields
    tables["data"]["eval"] = files if len(files) > 1 else files["eval"]
    return TrainConfig.from_tables(tables | {"steps": 1, "output_dir": str(directory), "compilation_cache": None})


def test_every_config_has_its_kind():
    assert CONFIGS.keys() == KINDS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_header_names_a_command_that_works(name):
    header = CONFIGS[name].read_text().split("\n\n")[0]
    assert "# Hardware: " in header and max(map(len, header.splitlines())) <= 120
    program, *arguments = re.search(r"^#   python (\S+)(.*)$", header, re.MULTILINE)[0].split()[2:]
    assert (ROOT / program).is_file()
    if name == "quickstart":
        assert not arguments and "docs/BENCHMARKS.md" in header
        return
    assert "# Reaches: " in header
    path, *options = arguments
    config, run = parse([str(ROOT / path), *options])
    assert run == name and config.steps == read_toml(CONFIGS[name])["steps"]


def test_the_quickstart_is_the_shipped_one():
    assert CONFIGS["quickstart"].read_bytes() == QUICKSTART.read_bytes()


def _needs_its_judge(name):
    if "math_verify" in read_toml(CONFIGS[name]).get("reward", {}).get("functions", ()):
        pytest.importorskip("math_verify")


TRAINED = [name for name in CONFIGS if name != "gsm8k_qwen2.5_1.5b"]


@pytest.mark.parametrize("name", TRAINED)
def test_it_reads_a_file_of_its_format(name, checkpoint, tmp_path):
    _needs_its_judge(name)
    model_type, (row, *_), _ = KINDS[name]
    directory, first = checkpoint(model_type), str(next(iter(row.values())))
    config = tiny(name, directory, tmp_path / "run", tmp_path)
    tokenizer = load_tokenizer(directory)
    held_out = held_out_prompts(config, tokenizer)
    prompts = training_prompts(config, tokenizer)
    assert len(prompts) == 4
    with pool_from(config, config.reward.functions) as pool:
        for part in (prompts, *held_out.values()):
            pool.check_columns(part.columns)
    assert [len(prompts) for prompts in held_out.values()] == [4] * len(held_out)
    prompt = next(iter(held_out.values())).prompts[0]
    assert isinstance(prompt.text, str) == (not config.data.as_messages)
    words = prompt.text if isinstance(prompt.text, str) else prompt.text[-1]["content"]
    assert not re.search(r"\{\w+\}", words) and first in words


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "dapo_math" else pytest.mark.slow) for name in TRAINED]
)
def test_it_trains_a_tiny_model_of_its_kind(name, checkpoint, tmp_path):
    _needs_its_judge(name)
    config = tiny(name, checkpoint(KINDS[name][0]), tmp_path / "run", tmp_path)
    grpo_jax.Trainer(config=TrainConfig.from_tables(config.model_dump() | _no_evaluation(config)), name=name).train()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 1 and np.isfinite(metrics[0]["loss"])
    completions = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 8 or (config.algorithm.dynamic_sampling and 0 < len(completions) < 8)


def _no_evaluation(config):
    """Evaluation is the trainer's test; without it nothing more is compiled."""
    return {"data": config.data.model_dump() | {"eval": None}}


def test_the_larger_sibling_differs_in_size_only():
    small, large = (read_toml(CONFIGS[f"gsm8k_qwen2.5_{size}"]) for size in ("0.5b", "1.5b"))
    small["model"]["path"] = large["model"]["path"]
    small["optim"]["microbatch_rows"] = large["optim"]["microbatch_rows"]
    assert small == large
