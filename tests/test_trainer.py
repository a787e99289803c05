"""The loop on a tiny checkpoint: what a run leaves behind, what it computes, what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import grpo_jax
from grpo_jax.callbacks import Callback
from grpo_jax.cli import QUICKSTART, parse
from grpo_jax.config import TrainConfig
from grpo_jax.learner.step import Learner
from grpo_jax.metrics import read_json_lines
from grpo_jax.testing import tiny_checkpoint

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3, 9) for b in range(2, 9)]
METRICS = """reward reward_std frac_reward_zero_std rewards/share_of_digits/mean rewards/share_of_digits/std
completions/mean_length completions/min_length completions/max_length completions/clipped_ratio entropy kl
clip_ratio/low clip_ratio/high clip_ratio/region grad_norm learning_rate seconds seconds/rollout seconds/reward
seconds/update tokens_per_second sampler_logp_difference/mean sampler_logp_difference/max compile_count""".split()


def share_of_digits(prompts, completions, completion_ids, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


def config_for(output_dir, **tables) -> TrainConfig:
    base = {
        "steps": 3,
        "output_dir": str(output_dir),
        "compilation_cache": None,
        "rollout": {"prompts_per_step": 4, "num_samples": 4, "max_new_tokens": 6},
        "eval": {"every": 2, "prompts": 8, "samples": 2},
        "optim": {"learning_rate": 3e-3},
        "log": {"quiet": True, "completions": 5},
    }
    for name, table in tables.items():
        base[name] = base[name] | table if isinstance(base.get(name), dict) else table
    return TrainConfig.from_tables(base)


def train(checkpoint, output_dir, rewards=share_of_digits, callbacks=(), **tables):
    config = config_for(output_dir, **tables)
    trainer = grpo_jax.Trainer(checkpoint, rewards, ROWS[:20], ROWS[20:], config=config, callbacks=callbacks)
    return trainer, trainer.train()


class Enough(Callback):
    """Ends a run where it would begin to sample: everything is checked and opened, nothing compiled."""

    def on_start(self, run):
        raise RuntimeError("enough")


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "one"
    trainer, summary = train(checkpoint, directory, algorithm={"preset": "grpo"})
    return trainer, summary, directory


def test_the_run_directory_holds_what_was_promised(run):
    trainer, summary, directory = run
    names = {p.name for p in directory.iterdir()}
    assert {
        "config.toml",
        "metrics.jsonl",
        "completions.jsonl",
        "summary.json",
        "curves.png",
        "hf",
        "checkpoints",
    } <= names
    assert TrainConfig.from_toml(directory / "config.toml") == trainer.config
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert {"accuracy_first", "accuracy_best", "accuracy_last", "steps", "seconds", "seconds_by_phase"} <= set(summary)
    assert {"compile_seconds", "peak_memory_bytes", "versions"} <= set(summary)
    assert summary["steps"] == 3 and summary["peak_memory_bytes"] > 10**8 and summary["compile_seconds"] > 0
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_every_promised_figure(run):
    rows = read_json_lines(run[2] / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        missing = [name for name in METRICS if not math.isfinite(row.get(name, math.nan))]
        assert not missing
        assert row["sampler_logp_difference/mean"] <= 1e-5 and row["sampler_logp_difference/max"] <= 1e-4
        assert row["skipped_update_count"] == 0 and row["ratio"] == pytest.approx(1, abs=1e-5)
        assert row["seconds"] >= row["seconds/rollout"] + row["seconds/update"] - 1e-6
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-7
    evaluations = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert all(row["eval/avg_at_k"] <= row["eval/pass_at_k"] for row in evaluations)
    assert "jit(update)" in steps[0]["compiled"]
    assert steps[-1]["compiled"] == [] and steps[-1]["compile_count"] == steps[-2]["compile_count"]
    assert steps[0]["batch/row_count"] == 8


def test_completions_are_logged_with_rewards_and_advantages(run):
    rows = read_json_lines(run[2] / "completions.jsonl")
    assert len(rows) == 3 * 8  # whole groups of 4 that hold 5
    for row in rows:
        assert row["rewards"]["share_of_digits"] == pytest.approx(share_of_digits([], [row["completion"]], [])[0])
        assert row["reward"] == pytest.approx(row["rewards"]["share_of_digits"])
        assert row["finish"] in ("stop", "length") and 1 <= row["length"] <= 6
        assert row["prompt"] in {r["prompt"] for r in ROWS}


@pytest.mark.slow
def test_training_raises_the_reward(checkpoint, tmp_path):
    more = {"rollout": {"prompts_per_step": 8, "num_samples": 8, "max_new_tokens": 6}, "optim": {"learning_rate": 1e-2}}
    train(
        checkpoint, tmp_path / "a", steps=16, algorithm={"preset": "bnpo"}, eval={"every": None, "samples": 0}, **more
    )
    rewards = [row["reward"] for row in read_json_lines(tmp_path / "a" / "metrics.jsonl") if "reward" in row]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2


def test_the_exported_model_is_the_trained_one(run):
    _, _, directory = run
    model, params = grpo_jax.load_model(directory / "hf")
    start, first = grpo_jax.load_model(run[0].config.model.path)
    tokens = np.arange(24).reshape(2, 12) % 40 + 2
    assert np.abs(np.asarray(model.logits(params, tokens) - start.logits(first, tokens))).max() > 1e-3
    pytest.importorskip("torch")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.logits(params, tokens)), expected, atol=2e-5 * np.abs(expected).max())
    assert AutoTokenizer.from_pretrained(directory / "hf").eos_token_id == 1


@pytest.fixture
def counted(monkeypatch):
    calls = {"logprobs": 0, "update": 0}
    for name in calls:
        whole = getattr(Learner, name)

        def count(self, *args, _name=name, _whole=whole):
            calls[_name] += 1
            return _whole(self, *args)

        monkeypatch.setattr(Learner, name, count)
    return calls


@pytest.mark.parametrize(
    ("tables", "passes", "updates"),
    [
        pytest.param({"algorithm": {"preset": "bnpo"}}, 0, 2, marks=pytest.mark.slow),
        ({"algorithm": {"preset": "grpo"}}, 2, 2),
        pytest.param(
            {"algorithm": {"preset": "bnpo"}, "optim": {"minibatches": 2, "epochs": 2}, "batch": {"rows": "padded"}},
            4,
            8,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_passes_run_only_where_the_algorithm_needs_them(checkpoint, tmp_path, counted, tables, passes, updates):
    _, summary = train(checkpoint, tmp_path / "run", steps=2, eval={"every": None, "samples": 0}, **tables)
    assert counted == {"logprobs": passes, "update": updates}
    last = read_json_lines(tmp_path / "run" / "metrics.jsonl")[-2]
    if updates > 2:
        assert last["ratio"] != 1.0


def test_several_rewards_weights_columns_and_no_answer(checkpoint, tmp_path):
    seen = {}

    def second(prompts, completions, completion_ids, answer, **columns):
        seen["lengths"] = {len(prompts), len(completions), len(completion_ids), len(answer)}
        seen["answers"] = [str(eval(p[:-1])) == a for p, a in zip(prompts, answer, strict=True)]
        return [None if i % 3 == 0 else float(len(ids)) for i, ids in enumerate(completion_ids)]

    tables = {"steps": 1, "reward": {"functions": ["a", "b"], "weights": [2.0, 0.5]}}
    train(checkpoint, tmp_path / "run", [share_of_digits, second], **tables)
    assert seen["lengths"] == {16} and all(seen["answers"])
    rows = read_json_lines(tmp_path / "run" / "completions.jsonl")
    assert [row["rewards"]["second"] is None for row in rows] == [i % 3 == 0 for i in range(8)]
    for row in rows:
        expected = 2 * row["rewards"]["share_of_digits"] + 0.5 * (row["rewards"]["second"] or 0)
        assert row["reward"] == pytest.approx(expected, rel=1e-6)


def test_a_reward_without_spread_moves_nothing(checkpoint, tmp_path):
    def constant(prompts, completions, completion_ids, **columns):
        return [0.1] * len(completions)

    train(checkpoint, tmp_path / "run", constant, algorithm={"preset": "bnpo"}, eval={"every": None, "samples": 0})
    rows = [row for row in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert all(row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 for row in rows)
    before, after = (grpo_jax.load_model(d)[1] for d in (checkpoint, tmp_path / "run" / "hf"))
    import jax

    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_refuses_a_directory_of_another_run_and_shows_the_difference(run, checkpoint):
    _, _, directory = run
    before = sorted(p.stat().st_mtime_ns for p in directory.iterdir())
    with pytest.raises(ValueError, match=r"another config \(optim.learning_rate: 0.003 -> 0.5\)"):
        train(checkpoint, directory, algorithm={"preset": "grpo"}, optim={"learning_rate": 0.5})
    assert sorted(p.stat().st_mtime_ns for p in directory.iterdir()) == before


def test_a_run_that_never_began_does_not_block_its_directory(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        train(tmp_path / "wrong", tmp_path / "run", steps=1)
    with pytest.raises(RuntimeError, match="enough"):
        train(checkpoint, tmp_path / "run", callbacks=[Enough()], steps=1, eval={"samples": 0})
    assert TrainConfig.from_toml(tmp_path / "run" / "config.toml").model.path == str(checkpoint)


def test_refuses_a_directory_with_other_files(checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files and no config.toml"):
        train(checkpoint, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [1.0] * (n - 1), "15"),
        (lambda n: ["good"] * n, "good"),
        (lambda n: [math.inf] * n, "inf"),
        (lambda n: 1 / 0, "division by zero"),
    ],
)
def test_a_reward_that_misbehaves_is_named(checkpoint, tmp_path, returned, message):
    def culprit(prompts, completions, completion_ids, **columns):
        return returned(len(completions))

    with pytest.raises(ValueError, match="culprit") as caught:
        train(checkpoint, tmp_path / "run", culprit, steps=1, eval={"every": None, "prompts": 1, "samples": 0})
    assert message in str(caught.value) or message == "15"


def test_wrong_paths_are_named_before_anything_is_compiled(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        grpo_jax.Trainer(model=tmp_path / "nowhere", config=config_for(tmp_path / "a")).train()
    with pytest.raises(ValueError, match=r"absent\.jsonl"):
        grpo_jax.Trainer(train_dataset=tmp_path / "absent.jsonl", config=config_for(tmp_path / "b")).train()


def test_the_record_describes_what_was_handed_in(checkpoint, tmp_path):
    trainer = grpo_jax.Trainer(
        model=checkpoint, reward_funcs=share_of_digits, train_dataset=ROWS, config=config_for(tmp_path)
    )
    assert trainer.config.model.path == str(checkpoint)
    assert trainer.config.data.train == f"<{len(ROWS)} rows>" and trainer.config.data.eval is None
    assert trainer.config.reward.functions[0].endswith(":share_of_digits")
    assert Path(trainer.config.output_dir) == tmp_path
    weights = {"many.jsonl": 1, "few.jsonl": 3}
    assert grpo_jax.Trainer(checkpoint, train_dataset=weights, config=trainer.config).config.data.train == weights


def test_held_out_prompts_of_the_config_hold_beside_rows(checkpoint, tmp_path):
    config = config_for(tmp_path, data={"eval": "held_out.jsonl"})
    trainer = grpo_jax.Trainer(checkpoint, share_of_digits, ROWS, config=config)
    assert trainer.config.data.eval == "held_out.jsonl"


@pytest.mark.parametrize("callback", [Callback, object()])
def test_a_callback_that_is_none_is_refused_at_once(checkpoint, callback):
    with pytest.raises(ValueError, match=r"^callbacks: got .* derive its class from that, and give an object of it$"):
        grpo_jax.Trainer(model=checkpoint, train_dataset=ROWS, callbacks=[callback])


def test_own_model_and_data_are_not_judged_by_the_shipped_reward_unless_it_is_named(checkpoint, tmp_path):
    own = {"model": {"path": str(checkpoint)}, "data": {"train": "own.jsonl"}}
    for arguments in (
        {"model": checkpoint, "train_dataset": ROWS},
        {"config": config_for(tmp_path, **own)},
        {"config": config_for(tmp_path, **own, reward={"weights": [1.0]})},
        {"config": parse([f"--model.path={checkpoint}", "--data.train=own.jsonl"])[0]},
        {"config": parse([str(QUICKSTART), f"--model.path={checkpoint}", "--data.train=own.jsonl"])[0]},
    ):
        with pytest.raises(
            ValueError, match=r"^reward\.functions: got none for a model and data of your own, .* Name "
        ):
            grpo_jax.Trainer(**arguments)
    named = config_for(tmp_path, **own, reward={"functions": ["quickstart"]})
    for arguments in ({"config": named}, {"model": checkpoint}, {"train_dataset": ROWS}, {}):
        assert grpo_jax.Trainer(**arguments).config.reward.functions == ("quickstart",)


def test_a_run_that_died_before_its_first_checkpoint_says_that_it_begins_anew(checkpoint, tmp_path, capsys):
    config = config_for(tmp_path / "run", log={"quiet": False, "report": False})
    trainer = grpo_jax.Trainer(checkpoint, share_of_digits, ROWS, config=config, callbacks=[Enough()])
    anew = f"no checkpoint yet in {tmp_path / 'run'}: begins anew"
    with pytest.raises(RuntimeError, match="enough"):
        trainer.train()
    assert anew not in capsys.readouterr().out
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n')
    with pytest.raises(RuntimeError, match="enough"):
        trainer.train()
    assert anew in capsys.readouterr().out and metrics.read_text() == ""


def test_contract_13_what_cannot_work_is_said_before_anything_is_compiled(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"rollout.max_new_tokens: got 1000000, .* 256 positions"):
        train(checkpoint, tmp_path / "run", rollout={"max_new_tokens": 1_000_000})


@pytest.mark.slow
def test_a_model_that_broke_ends_the_run(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="log-probabilities are not finite"):
        train(checkpoint, tmp_path / "run", steps=20, optim={"learning_rate": 1e38, "max_grad_norm": None})


def test_prompts_that_are_too_long_are_counted_and_said(checkpoint, tmp_path, capsys):
    config = config_for(
        tmp_path / "run", steps=1, data={"max_prompt_len": 4}, log={"quiet": False}, eval={"samples": 0}
    )
    rows = [*ROWS[:8], {"prompt": "10+10=", "answer": "20"}]
    with pytest.raises(RuntimeError, match="enough"):
        grpo_jax.Trainer(checkpoint, share_of_digits, rows, config=config, callbacks=[Enough()]).train()
    assert "1 of 9 prompts are longer than data.max_prompt_len" in capsys.readouterr().out


def test_contract_10_the_reference_stays_where_the_run_started(checkpoint, tmp_path):
    """With a KL and no advantage, the gradient is 0 at the start and the policy never leaves it."""

    def constant(prompts, completions, completion_ids, **columns):
        return [1.0] * len(completions)

    train(checkpoint, tmp_path / "still", constant, algorithm={"preset": "grpo"}, eval={"every": None, "samples": 0})
    rows = [row for row in read_json_lines(tmp_path / "still" / "metrics.jsonl") if "kl" in row]
    assert all(abs(row["kl"]) < 1e-6 for row in rows)
    train(checkpoint, tmp_path / "moves", steps=6, algorithm={"preset": "grpo"}, eval={"every": None, "samples": 0})
    rows = [row for row in read_json_lines(tmp_path / "moves" / "metrics.jsonl") if "kl" in row]
    assert abs(rows[0]["kl"]) < 1e-6 < 2 * rows[1]["kl"] < rows[-1]["kl"]


def test_a_run_can_be_made_longer(checkpoint, tmp_path):
    """At a constant learning rate two steps and then two more are four, to the bit."""
    tables = {"eval": {"samples": 0, "every": None}, "optim": {"schedule": "constant"}}
    train(checkpoint, tmp_path / "straight", steps=4, **tables)
    train(checkpoint, tmp_path / "longer", steps=2, **tables)
    trainer, summary = train(checkpoint, tmp_path / "longer", steps=4, **tables)
    weights = [(tmp_path / run / "hf" / "model.safetensors").read_bytes() for run in ("straight", "longer")]
    assert summary["steps"] == 4 and weights[0] == weights[1]
    assert TrainConfig.from_toml(tmp_path / "longer" / "config.toml").steps == 4
    with pytest.raises(ValueError, match="steps: 4 -> 3"):
        train(checkpoint, tmp_path / "longer", steps=3, **tables)
    lines = (tmp_path / "longer" / "metrics.jsonl").read_bytes()
    train(checkpoint, tmp_path / "longer", steps=4, **tables)  # it has ended: nothing changes
    assert (tmp_path / "longer" / "metrics.jsonl").read_bytes() == lines
    assert (tmp_path / "longer" / "hf" / "model.safetensors").read_bytes() == weights[0]


def test_a_run_whose_learning_rate_ends_cannot_be_made_longer(checkpoint, tmp_path):
    tables = {"eval": {"samples": 0, "every": None}, "optim": {"schedule": "linear"}}
    with pytest.raises(RuntimeError, match="enough"):
        train(checkpoint, tmp_path / "run", callbacks=[Enough()], steps=1, **tables)
    with pytest.raises(ValueError, match="steps: 1 -> 2"):
        train(checkpoint, tmp_path / "run", steps=2, **tables)


@pytest.mark.parametrize(
    "handed_in", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["by its config", "from Python"]
)
def test_a_mixture_of_files_trains_by_its_weights_and_goes_on(handed_in, checkpoint, tmp_path):
    weights, rows = {}, {"many": ROWS[:20], "few": [{"prompt": "1+1=", "answer": "2"}]}
    for (name, part), weight in zip(rows.items(), (1, 3), strict=True):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        weights[str(path)] = weight
    log = {"quiet": True, "report": False, "completions": 16}
    for steps in (8, 10):
        config = config_for(
            tmp_path / "run", steps=steps, data={"train": "quickstart" if handed_in else weights, "eval": None}, log=log
        )
        own = {"train_dataset": weights} if handed_in else {}
        trainer = grpo_jax.Trainer(checkpoint, share_of_digits, config=config, **own)
        assert trainer.config.data.train == weights and trainer.train()["steps"] == steps
    drawn = [row["prompt"] for row in read_json_lines(tmp_path / "run" / "completions.jsonl") if row["sample"] == 0]
    assert len(drawn) == 40 and 22 <= drawn.count("1+1=") <= 38  # 30 in the mean; 3 standard deviations are 8
    assert set(drawn) - {"1+1="} <= {row["prompt"] for row in ROWS[:20]}
