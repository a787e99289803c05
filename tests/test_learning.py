"""What a step does around the update: which passes run, what is picked, what moves on, and functions of the user's."""

import json
import math

import jax
import numpy as np
import pytest
from learning_cases import assert_same_update, collected_for, config_for, copied, learning_for, moved

from grpo_jax.learner.dials import Controllers
from grpo_jax.learner.step import Learner
from grpo_jax.metrics import CompileLog


@pytest.mark.parametrize(
    ("tables", "old", "reference"),
    [
        ({"preset": "dapo"}, 0, 0),
        ({"preset": "grpo"}, 0, 1),
        ({"preset": "rloo"}, 0, 1),
        ({"preset": "grpo", "loss": {"kl_coef": 0.0}}, 0, 0),
        ({"preset": "dapo", "optim": {"epochs": 2}}, 1, 0),
        ({"preset": "grpo", "optim": {"minibatches": 2}}, 2, 2),
        ({"preset": "ppo", "optim": {"minibatches": 2, "epochs": 3}}, 2, 0),
        ({"preset": "dapo", "model": {"dtype": "bfloat16"}}, 0, 0),
    ],
)
def test_updates_and_passes_run_once_a_part_and_only_where_they_are_needed(monkeypatch, tables, old, reference):
    preset, optim, model = tables["preset"], tables.get("optim", {}), tables.get("model", {})
    config = config_for(preset, optim=optim, model=model, algorithm={"loss": tables.get("loss", {})})
    learning = learning_for(config)
    learning.critic = learning.creditor = None  # values and credit are test_critic.py's
    seen: list[bool] = []
    parts = []

    def count(learner, params, batch):
        seen.append(params is learning.state.params)
        return np.zeros(batch.tokens.shape, np.float32)

    def update(learner, state, batch, *rest):
        parts.append(batch)
        return state, {"skipped_update_count": (1.0, 0.0)}, {}

    monkeypatch.setattr(Learner, "logprobs", count)
    monkeypatch.setattr(Learner, "update", update)
    learning.train(collected_for(config))
    minibatches, epochs = optim.get("minibatches", 1), optim.get("epochs", 1)
    assert len(parts) == minibatches * epochs and all(part is parts[n % minibatches] for n, part in enumerate(parts))
    assert (sum(seen), len(seen) - sum(seen)) == (old, reference)
    assert all((part.old_logp is not None) == bool(old) for part in parts)
    assert all((part.ref_logp is not None) == bool(reference) for part in parts)
    assert config.loss.correction == ("tis" if model else None)


PICKS = {
    "clip_cov and entropy_top": {
        "surrogate": "clip_cov",
        "clip_cov_low": -9.0,
        "clip_cov_high": 9.0,
        "clip_cov_share": 0.3,
        "entropy_top": 0.6,
        "aggregation": "token_mean",
    },
    "kl_cov": {"surrogate": "kl_cov", "kl_cov_share": 0.2, "kl_cov_coef": 3.0, "aggregation": "token_mean"},
}


@pytest.fixture(scope="module")
def unpicked():
    """An update in which nothing is picked."""
    config = config_for("bnpo", optim={"epochs": 2}, algorithm={"loss": {"aggregation": "token_mean"}})
    learning = learning_for(config)
    before = copied(learning.state)
    learning.train(collected_for(config))
    return moved(before, learning.state)


@pytest.mark.parametrize("name", ["clip_cov and entropy_top", pytest.param("kl_cov", marks=pytest.mark.slow)])
def test_contract_5_what_a_statistic_picks_is_of_the_whole_step_for_any_rows_and_microbatches(name, unpicked):
    updates, figures = [], []
    for rows, batch in ((None, {"rows": "padded"}), (6, {"rows": "group", "row_len": 16})):
        optim = {"microbatch_rows": rows, "epochs": 2}
        config = config_for("bnpo", optim=optim, algorithm={"loss": PICKS[name]}, batch=batch)
        learning = learning_for(config)
        before = copied(learning.state)
        figures.append(learning.train(collected_for(config))[1])
        updates.append(moved(before, learning.state))
    assert_same_update(*updates)
    assert figures[0]["policy_loss"] == pytest.approx(figures[1]["policy_loss"], abs=1e-6)
    gap = [np.abs(a - b).max() for a, b in zip(unpicked, updates[0], strict=True)]
    assert max(gap) > 1e-4


def test_an_entropy_bonus_that_is_off_goes_on_with_its_coefficient():
    moving = {"adaptive_entropy": {"target": 1.0, "delta": 0.25}, "loss": {"entropy_coef": 0.5}}
    controllers, again = (Controllers(config_for("grpo", algorithm=moving)) for _ in range(2))
    controllers.advance({"entropy": 3.0}, 16)
    assert float(controllers.dials.entropy_coef) == 0  # above the target
    again.restore(json.loads(json.dumps(controllers.state())))
    for each in (controllers, again):
        each.advance({"entropy": 0.5}, 16)
        assert float(each.dials.entropy_coef) == 0.5  # a step down, and one up again


@pytest.fixture(scope="module")
def moving():
    """A config in which everything moves that can, and its learner, compiled once."""
    tables = {
        "adaptive_kl": {"target": 1e-4, "horizon": 40.0},
        "adaptive_entropy": {"target": 9.0, "delta": 0.25},
        "reference_follow": {"every": 1, "alpha": 0.25},
    }
    config = config_for("grpo", algorithm=tables | {"loss": {"entropy_coef": 0.125}})
    return config, learning_for(config).learner


def test_coefficients_and_the_reference_move_resume_exactly_and_compile_nothing(moving):
    config, learner = moving
    learning = learning_for(config)
    learning.learner = learner
    start = jax.tree.map(np.asarray, copied(learning.state))
    assert learning.reference is None and learning.controllers.dials == (np.float32(0.04), np.float32(0))
    _, first = learning.train(collected_for(config, 0))
    mixed = jax.tree.map(lambda new, old: 0.25 * np.asarray(new) + 0.75 * old, learning.params, start.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), learning.state.reference, mixed)
    # The first step's KL is 0 to rounding: the coefficient falls by the most that 16 completions of 40 allow.
    assert first["kl_coef"] == pytest.approx(0.04) and first["entropy_coef"] == 0
    assert learning.controllers.dials == (pytest.approx(0.04 * (1 - 0.2 * 16 / 40)), 0.375)
    saved, record = copied(learning.state), json.loads(json.dumps(learning.controllers.state()))
    with CompileLog() as compiles:
        _, second = learning.train(collected_for(config, 1))
    assert compiles.count == 0
    assert second["entropy_coef"] == 0.375 and abs(second["kl_per_sequence"]) > 1e-3
    error = np.clip(second["kl_per_sequence"] / 1e-4 - 1, -0.2, 0.2)
    assert learning.controllers.kl_coef == pytest.approx(0.0368 * (1 + error * 16 / 40))
    whole = jax.tree.map(np.asarray, copied(learning.state))
    learning.state = saved
    learning.controllers.restore(record)
    learning.train(collected_for(config, 1))
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(np.asarray, learning.state))


def test_a_step_in_which_no_group_counts_changes_nothing(moving):
    config, learner = moving
    learning = learning_for(config)
    learning.learner = learner
    learning.train(collected_for(config))
    before, record = jax.tree.map(np.asarray, copied(learning.state)), learning.controllers.state()
    _, figures = learning.train(collected_for(config, counted=[False] * 4))
    assert figures["skipped_update_count"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, learning.state))
    assert learning.controllers.state() == record


OWN = """
import jax.numpy as jnp

def centred(rewards, scored, options):
    mean = jnp.sum(rewards, 1, keepdims=True) / jnp.maximum(jnp.sum(scored, 1, keepdims=True), 1)
    return jnp.where(scored, rewards - mean, 0.0)

def plain(inputs, config):
    return -inputs.ratio * inputs.tokens.advantages

def flat(rewards, scored, options):
    return rewards.sum()

def host(rewards, scored, options):
    return rewards if rewards.max() > 0 else -rewards
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / f"own_{tmp_path.name}.py").write_text(OWN)
    return str(tmp_path / f"own_{tmp_path.name}.py")


def test_a_users_own_advantage_and_surrogate_train_like_those_they_repeat(own):
    updates = []
    for algorithm in (
        {"advantage": f"{own}:centred", "loss": {"surrogate": f"{own}:plain"}},
        {"advantage": "dr_grpo", "loss": {"clip_low": None, "clip_high": None}},
    ):
        config = config_for("bnpo", algorithm=algorithm)
        learning = learning_for(config)
        before = copied(learning.state)
        batch, _ = learning.train(collected_for(config))
        assert np.abs(batch.scored.advantages).max() > 0.1
        updates.append(moved(before, learning.state))
    assert_same_update(*updates)
    (part,), _ = learning._pack(batch)
    old, new = (np.asarray(learning.learner.logprobs(params, part)) for params in (before.params, learning.params))
    assert ((new - old) * part.advantages).sum() > 1e-3  # what was rewarded is likelier now


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"advantage": "{own}:none"}, "algorithm.advantage: .* has no function 'none'"),
        ({"advantage": "no_such_module:f"}, "algorithm.advantage: .* ModuleNotFoundError"),
        ({"loss": {"surrogate": "missing.py:f"}}, "algorithm.loss: function 'missing.py:f': no file 'missing.py'"),
        ({"advantage": "{own}:flat"}, r"algorithm.advantage: gives .* must give one array of shape \(4, 4\)"),
        ({"advantage": "{own}:host"}, "algorithm.advantage: cannot be traced by jax"),
        ({"loss": {"surrogate": "{own}:centred"}}, "algorithm.loss.surrogate: cannot be traced by jax: TypeError"),
    ],
)
def test_own_functions_are_refused_by_field_before_anything_is_compiled(own, algorithm, said):
    algorithm = json.loads(json.dumps(algorithm).replace("{own}", own))
    with CompileLog() as compiles, pytest.raises(ValueError, match=said):
        learning_for(config_for("bnpo", algorithm=algorithm))
    assert compiles.count == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_coefficients_stay_where_a_step_has_no_finite_figure(broken):
    tables = {"adaptive_kl": {"target": 1.0}, "adaptive_entropy": {"target": 1.0}}
    controllers = Controllers(config_for("grpo", algorithm=tables))
    controllers.advance({"kl_per_sequence": 2.0, "entropy": 0.5}, 16)
    before = controllers.state()
    controllers.advance({"kl_per_sequence": broken, "entropy": broken}, 16)
    assert controllers.state() == before and all(map(math.isfinite, controllers.figures.values()))
    controllers.kl_coef = 3.4e38
    controllers.advance({"kl_per_sequence": 9.0, "entropy": 0.5}, 16)
    assert math.isfinite(controllers.figures["kl_coef"])
