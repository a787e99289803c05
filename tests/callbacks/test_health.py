"""Runs made sick on purpose: each says what is wrong, once, with the field to change; a healthy one says nothing.

The sick runs are real ones on the tiny model; the numbers from which a check speaks are tested on steps made up.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import grpo_jax
from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.callbacks.early_stopping import EarlyStopping
from grpo_jax.callbacks.environment import Environment
from grpo_jax.callbacks.health import CHECKS, Health
from grpo_jax.config import StopConfig, TrainConfig
from grpo_jax.rundir import ENVIRONMENT
from grpo_jax.testing import tiny_checkpoint, tiny_tokenizer
from grpo_jax.types import Rollout

Q, G, T = 8, 4, 10
TOKENIZER = tiny_tokenizer()
STOP, LETTER, PAD = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("a"), TOKENIZER.pad_token_id


def step(
    number: int, rewards: Any = None, lengths: Any = 4, stopped: Any = True, token: int = LETTER, **metrics
) -> Step:
    """A made-up step: rewards [F, N], and rows of ``token`` of which those ``stopped`` end in the stop token."""
    rng = np.random.default_rng(number)
    rewards = rng.integers(0, 2, (1, Q * G)).astype(np.float32) if rewards is None else np.asarray(rewards, np.float32)
    lengths, stopped = np.broadcast_to(lengths, Q * G), np.broadcast_to(stopped, Q * G)
    tokens = np.full((Q * G, 2 + T), token, np.int32)
    tokens[np.arange(Q * G)[stopped], 1 + lengths[stopped]] = STOP
    finish = np.where(stopped, "stop", "length")
    rollout = Rollout(tokens, np.full(Q * G, 2), lengths, np.zeros(tokens.shape, np.float32), finish)
    groups = np.nansum(rewards, 0).reshape(Q, G)
    scored = SimpleNamespace(by_function=rewards, spread=groups.max(1) != groups.min(1))
    row = {"entropy": 1.0, "grad_norm": 0.5, "sampler_logp_difference/mean": 1e-6, "sampler_logp_difference/max": 1e-5}
    stds = {f"rewards/f{i}/std": float(np.nanstd(r)) for i, r in enumerate(rewards) if np.isfinite(r).any()}
    return Step(number, {"step": number, **row, **stds, **metrics}, [], rollout, scored)


def heard(
    steps: list[Step], history: tuple = (), functions: int = 1, most: int | None = None, **tables: Any
) -> list[str]:
    """What a run of these steps is told, of a model that has positions for ``most`` new tokens."""
    config, said = TrainConfig.from_tables(tables), list[str]()
    health = Health(config, said.append)
    names = tuple(f"f{i}" for i in range(functions))
    health.on_start(Run(config, None, TOKENIZER, names, history=history, most_new_tokens=most))
    for each in steps:
        health.on_step(each)
    return said


def constant(value: float) -> np.ndarray:
    return np.full((1, Q * G), value)


def mostly_alike(spread: int, value: float = 0.0) -> np.ndarray:
    """Rewards of which ``spread`` groups differ, the others all ``value``."""
    rewards = np.full((Q, G), value)
    rewards[:spread] = np.arange(G) % 2
    return rewards.reshape(1, -1)


def test_ordinary_steps_say_nothing():
    assert heard([step(i, entropy=1.0 - 0.04 * i) for i in range(1, 21)]) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, ("100% of them are too hard", "every reward was 0,", "easier prompts")), (1.0, ("100% too easy", "harder"))],
)
def test_groups_without_spread_are_said_with_the_split(value, said):
    warnings = heard([step(i, constant(value)) for i in range(1, 9)])
    assert len(warnings) == 1
    for part in ("health (no_spread): 100% of the groups", "rollout.num_samples", "algorithm.dynamic_sampling", *said):
        assert part in warnings[0]


def test_the_split_counts_both_sides_and_one_odd_step_says_nothing():
    half = np.concatenate([np.zeros(Q * G // 2), np.ones(Q * G // 2)])[None]
    assert "50% of them are too hard (all wrong), 50% too easy" in heard([step(i, half) for i in range(3)])[0]
    assert heard([step(1), step(2, constant(0)), step(3, constant(0)), step(4)]) == []
    assert heard([step(i, mostly_alike(1)) for i in range(3)]) == []  # 7 of 8 groups: 88 %
    assert heard([step(i, mostly_alike(i == 0)) for i in range(3)]) != []  # 23 of 24: 96 %


def test_what_is_already_set_is_not_advised():
    steps = [step(i, constant(0.0)) for i in range(3)]
    (warning,) = heard(steps, algorithm={"dynamic_sampling": True})
    assert "algorithm.dynamic_sampling" not in warning


def test_an_estimator_without_groups_needs_no_spread_but_a_reward_that_varies():
    steps = [step(i, constant(1.0)) for i in range(12)]
    (warning,) = heard(steps, algorithm={"advantage": "batch_mean"})
    assert "'f0' gave 1 to all" in warning and "10 steps" in warning


def test_a_function_that_answers_nothing_or_never_varies_is_named():
    good = [np.arange(Q * G) % 2 for _ in range(12)]
    silent = [step(i, [good[i], np.full(Q * G, np.nan)]) for i in range(12)]
    (warning,) = heard(silent, functions=2, reward={"functions": ["a", "b"]})
    assert "the reward 'f1' gave no answer (None) to any of the 96 completions" in warning
    same = [step(i, [good[i], np.full(Q * G, 0.25)]) for i in range(12)]
    (warning,) = heard(same, functions=2, reward={"functions": ["a", "b"]})
    assert "the reward 'f1' gave 0.25 to all 320 completions" in warning and "reward.functions" in warning
    once = ({"step": 1, "rewards/f1/std": 0.5},)  # it varied before the run was resumed, and is only satisfied now
    assert heard(same, once, functions=2, reward={"functions": ["a", "b"]}) == []


def test_no_stop_token_at_all_names_the_special_tokens_that_are_there():
    (warning,) = heard([step(i, lengths=T, stopped=False) for i in range(9)])
    assert "none of the 96 completions" in warning and "rollout.stop_token_ids" in warning and "hold" not in warning
    (warning,) = heard([step(i, lengths=T, stopped=False, token=PAD) for i in range(9)])
    assert f"they do hold '<pad>' (token {PAD})" in warning
    assert heard([step(i, lengths=T, stopped=np.arange(Q * G) < 1) for i in range(3)]) == []


def test_completions_cut_at_the_limit_are_said_with_a_length():
    quarter = np.arange(Q * G) % 4 == 0  # 75 % cut at 10; the others end at 2
    steps = [step(i, lengths=np.where(quarter, 2, T), stopped=quarter) for i in range(7)]
    (warning,) = heard(steps, rollout={"max_new_tokens": T})
    assert "75% of the completions of the last 5 steps were cut at rollout.max_new_tokens = 10" in warning
    # 8 tokens a completion, a quarter of the completions end: one end in 32 tokens; ln 20 of these are 96, in 64s 128
    assert "128 tokens would let 95% end" in warning
    (warning,) = heard(steps, rollout={"max_new_tokens": T}, most=32)  # and 1 - 1/e in 32 tokens
    assert "32 tokens would let 63% end" in warning and "128" not in warning
    (warning,) = heard(steps, rollout={"max_new_tokens": T}, most=T)
    assert "The model has no positions for more; shorten the prompts" in warning and "would let" not in warning
    half = np.arange(Q * G) % 2 == 0
    assert heard([step(i, lengths=np.where(half, 2, T), stopped=half) for i in range(7)]) == []


def test_entropy_that_collapses_is_said_unless_the_task_is_solved():
    def fall(to: float, rewards: Any = None) -> list[Step]:
        return [step(i, rewards, entropy=1.0 if i < 5 else to) for i in range(12)]

    (warning,) = heard(fall(0.09))
    assert "from 1 to 0.09 nat a token" in warning and "optim.learning_rate" in warning
    assert heard(fall(0.11)) == []
    assert heard(fall(0.01, mostly_alike(1, 1.0))) == []
    early = tuple({"step": i, "entropy": 1.0} for i in range(5))
    assert len(heard([step(i, entropy=0.05) for i in range(5, 12)], early)) == 1  # it was resumed in between


def test_sampler_and_learner_that_disagree_are_said_by_the_type_computed_in():
    def apart(mean: float, dtype: str, kept: str = "auto") -> list[str]:
        rows = {"sampler_logp_difference/mean": mean, "sampler_logp_difference/max": 3 * mean}
        return heard([step(i, **rows) for i in range(4)], model={"dtype": dtype}, rollout={"kv_dtype": kept})

    (warning,) = apart(2e-4, "float32")
    assert "disagree by 0.0002 nat" in warning and "report" in warning
    assert apart(2e-4, "bfloat16") == [] and apart(9e-5, "float32") == []
    (warning,) = apart(0.2, "bfloat16")
    assert 'algorithm.loss.correction = "tis"' in warning and "bug" not in warning
    assert apart(0.02, "float32", "int8") == []
    (warning,) = apart(0.2, "float32", "int8")
    assert "usual in int8" in warning and 'rollout.kv_dtype = "auto"' in warning and "bug" not in warning


@pytest.mark.parametrize(("norm", "field"), [(np.nan, "optim.learning_rate"), (0.0, "algorithm.overlong_filter")])
def test_gradients_that_change_nothing_are_said(norm, field):
    def broken(share: int) -> list[str]:
        return heard([step(i, grad_norm=norm if i % 5 < share else 0.5) for i in range(5)])

    (warning,) = broken(3)
    assert "60% of the last 5 steps" in warning and field in warning
    assert broken(2) == []


def test_every_check_is_documented_and_its_silencers_exist():
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    for name, check in CHECKS.items():
        assert check.function.__doc__ and set(check.unless) <= set(CHECKS) - {name}
        assert f"| `{name}` |" in page


class Listener(Callback):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_warning(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, one_device):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


def warnings_of(checkpoint, output_dir, reward, **tables: Any) -> list[str]:
    """Three steps of a real run."""
    base: dict[str, Any] = {
        "steps": 3,
        "output_dir": str(output_dir),
        "rollout": {"prompts_per_step": 8, "num_samples": 4, "max_new_tokens": 6},
        "eval": {"every": None},
        "checkpoint": {"every": None},
        "log": {"quiet": True, "report": False},
    }
    for name, table in tables.items():
        base[name] = base.get(name, {}) | table
    listener = Listener()
    rows = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    grpo_jax.Trainer(checkpoint, reward, rows, config=TrainConfig.from_tables(base), callbacks=[listener]).train()
    return listener.said


def wrong(prompts, completions, completion_ids, **columns):
    return [0.0] * len(completions)


def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def nothing(prompts, completions, completion_ids, **columns):
    return [None] * len(completions)


@pytest.mark.slow
def test_a_real_run_whose_rewards_are_all_zero_says_so(checkpoint, tmp_path):
    (warning,) = warnings_of(checkpoint, tmp_path / "run", wrong)
    assert "100% of the groups of the last 3 steps" in warning and "every reward was 0" in warning


def test_a_real_run_that_never_stops_and_has_a_reward_without_answers_says_both(checkpoint, tmp_path):
    def letters(prompts, completions, completion_ids, **columns):
        return [float(sum(c.isalpha() for c in text)) for text in completions]

    said = warnings_of(
        checkpoint, tmp_path / "run", [letters, nothing], rollout={"stop_token_ids": [60], "banned_token_ids": [60]}
    )
    assert len(said) == 2 and any("'nothing' gave no answer" in text for text in said)
    assert any("none of the 96 completions" in text and "'<eos>' (token 1)" in text for text in said)


def test_a_real_healthy_run_says_nothing(checkpoint, tmp_path):
    assert warnings_of(checkpoint, tmp_path / "run", length) == []
    assert (tmp_path / "run" / ENVIRONMENT).is_file()


def test_another_version_or_device_is_said_once_and_recorded(tmp_path, monkeypatch):
    def start(at: int) -> list[str]:
        said: list[str] = []
        Environment(said.append).on_start(Run(TrainConfig(), tmp_path, TOKENIZER, ("f",), start=at))
        return said

    assert start(0) == [] and start(3) == []
    from grpo_jax.callbacks import environment

    found = environment.versions() | {"jax": "9.9"}
    monkeypatch.setattr(environment, "versions", lambda: found)
    (warning,) = start(5)
    assert "-> 9.9" in warning and "packages or devices" in warning
    assert start(6) == []
    assert (tmp_path / ENVIRONMENT).read_text().count("from_step") == 2


@pytest.mark.parametrize(
    ("table", "values", "ends_at"),
    [
        ({"patience": 2}, [0.1, 0.2, 0.2, 0.1, 0.9], 3),
        ({"patience": 2}, [0.1, 0.2, 0.15, 0.3, 0.2, 0.4], None),
        ({"patience": 1, "min_delta": 0.05}, [0.1, 0.14, 0.9], 1),
        ({"at_least": 0.5}, [0.1, 0.4, 0.5, 0.2], 2),
        ({}, [0.5, 0.4, 0.3, 0.2], None),
        ({"patience": 1, "metric": "eval/pass_at_k"}, [0.2, 0.1], 1),
    ],
)
@pytest.mark.parametrize("resumed_at", [0, 1, 2])
def test_early_stopping_ends_a_run_resumed_or_not(table, values, ends_at, resumed_at):
    metric = table.get("metric", "eval/accuracy")
    rows = [{"step": i, metric: value} for i, value in enumerate(values)]
    stopping = EarlyStopping(StopConfig(**table))
    ended = stopping.on_start(Run(TrainConfig(), None, TOKENIZER, ("f",), history=({"step": 1}, *rows[:resumed_at])))
    at = resumed_at - 1 if ended else None
    for i, row in list(enumerate(rows))[resumed_at:]:
        if at is None and stopping.on_eval(Evaluation(i, row)):
            at = i
    assert at == ends_at


def test_a_real_run_ends_early_and_saves_what_it_has(checkpoint, tmp_path):
    rows = [{"prompt": f"{a}+1="} for a in range(4)]
    tables = {
        "steps": 5,
        "output_dir": str(tmp_path),
        "data": {"eval": "given"},
        "rollout": {"prompts_per_step": 8, "num_samples": 4, "max_new_tokens": 6},
        "eval": {"every": 1, "stop": {"patience": 1}},
        "checkpoint": {"every": None},
        "log": {"quiet": True, "report": False},
    }
    config = TrainConfig.from_tables(tables)
    summary = grpo_jax.Trainer(checkpoint, wrong, rows, rows, config=config).train()  # accuracy stays at 0
    assert summary["steps"] == 1 and (tmp_path / "checkpoints" / "1").is_dir()


def test_early_stopping_on_a_figure_that_is_not_there_names_the_nearest():
    with pytest.raises(ValueError, match=r"eval.stop.metric: got 'eval/acuracy', .* did you mean eval/accuracy\?"):
        EarlyStopping(StopConfig(metric="eval/acuracy", patience=1)).on_eval(Evaluation(0, {"eval/accuracy": 0.5}))


def test_what_was_warned_of_before_a_run_was_resumed_is_not_said_again():
    said, config, sick = list[str](), TrainConfig(), [step(i, stopped=False) for i in range(8)]
    health = Health(config, said.append)
    health.on_start(Run(config, None, TOKENIZER, ("f0",)))
    for each in sick[:4]:
        health.on_step(each)
    (line,) = said
    assert line.startswith("health (never_stops): ") and health.state() == ["never_stops"]
    again = Health(config, said.append)
    again.on_start(Run(config, None, TOKENIZER, ("f0",), 4, states={"Health": health.state()}))
    for each in sick[4:]:
        again.on_step(each)
    assert len(said) == 1
