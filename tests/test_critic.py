"""PPO's critic: values in rows of every kind, credit against a slow loop, what is trained with what, and resuming."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning_cases import (
    LIMIT,
    QUESTIONS,
    SAMPLES,
    assert_same_update,
    collected_for,
    config_for,
    copied,
    learning_for,
    moved,
    rollout_for,
    small_model,
)

from grpo_jax import Trainer
from grpo_jax.callbacks import Callback
from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.config import TrainConfig
from grpo_jax.learner.credit import Creditor, Tokens
from grpo_jax.metrics import read_json_lines
from grpo_jax.testing import tiny_checkpoint

ROWS = QUESTIONS * SAMPLES


def one_part(learning, config):
    (part,), _ = learning._pack(collected_for(config))
    return part


def test_values_are_read_before_each_token_whatever_rows_it_lies_in():
    tables, head = [], np.random.default_rng(0).standard_normal(16).astype(np.float32)
    for batch in ({"rows": "padded"}, {"rows": "packed", "row_len": 16}, {"rows": "group", "row_len": 16}):
        config = config_for("ppo", batch=batch)
        learning = learning_for(config)
        params = learning.state.critic.params | {"head": jnp.asarray(head)}
        part = one_part(learning, config)
        part = replace(part, old_values=learning.critic.values(params, learning.params, part))
        tokens = learning.creditor.tokens(part)
        tables.append(np.asarray(tokens.values))
        np.testing.assert_array_equal(tokens.completion.sum(1), rollout_for().completion_len)
    np.testing.assert_allclose(tables[1], tables[0], atol=1e-5)
    np.testing.assert_allclose(tables[2], tables[0], atol=1e-5)
    model, policy = small_model(1)
    rollout = rollout_for()
    column = jnp.broadcast_to(jnp.arange(rollout.tokens.shape[1], dtype=jnp.int32), rollout.tokens.shape)
    hidden = np.asarray(model.hidden(policy, rollout.tokens, column, jnp.ones_like(column)))
    for n in range(ROWS):
        start = rollout.prompt_len[n] - 1
        expected = hidden[n, start : start + rollout.completion_len[n]] @ head
        np.testing.assert_allclose(tables[0][n, : rollout.completion_len[n]], expected, atol=1e-4)
        assert (tables[0][n, rollout.completion_len[n] :] == 0).all()


def slow_gae(rewards, values, lengths, gamma, lam, penalty):
    advantages = np.zeros_like(values)
    for n, length in enumerate(lengths):
        after = value_after = 0.0
        for t in reversed(range(length)):
            gain = (rewards[n] if t == length - 1 else 0.0) - penalty[n, t]
            after = gain + gamma * value_after - values[n, t] + gamma * lam * after
            advantages[n, t], value_after = after, values[n, t]
    return advantages


def test_credit_is_gae_of_the_whole_rollout_with_the_kl_taken_token_by_token():
    draw = np.random.default_rng(3)
    config = config_for("ppo", algorithm={"gamma": 0.9, "lam": 0.8, "loss": {"kl_coef": 0.3, "kl_in_reward": True}})
    lengths = draw.integers(0, LIMIT + 1, ROWS)
    lengths[5] = LIMIT
    completion = np.arange(LIMIT) < lengths[:, None]
    mask = completion & (np.arange(ROWS) != 5)[:, None]  # filtered: in the recursion, in no statistic
    values, k1 = (draw.standard_normal((ROWS, LIMIT)) * completion for _ in range(2))
    reward, scored = draw.standard_normal(ROWS), np.arange(ROWS) != 9
    creditor = Creditor(config.algorithm, ROWS // 2, LIMIT, small_model(1)[0].compute.mesh)
    halves = [Tokens(*(jnp.asarray(x[i : i + 8]) for x in (completion, mask, k1, values))) for i in (0, 8)]
    arrays = (reward.reshape(4, 4), scored.reshape(4, 4), lengths.reshape(4, 4))
    out = creditor.credit(halves, *arrays, None, np.float32(0.3))
    expected = slow_gae(reward, values, lengths, 0.9, 0.8, 0.3 * k1) * scored[:, None]
    np.testing.assert_allclose(
        np.where(completion & scored[:, None], out.returns, 0), (expected + values) * scored[:, None], atol=1e-5
    )
    assert np.isnan(out.returns[9]).all()
    trained = mask & scored[:, None]
    white = (expected - expected[trained].mean()) / expected[trained].std(ddof=1)
    np.testing.assert_allclose(out.advantages, np.where(trained, white, 0), atol=1e-4)
    returns = (expected + values)[trained]
    explained = 1 - (returns - values[trained]).var() / returns.var()
    assert float(out.figures["critic/explained_variance"]) == pytest.approx(explained, abs=1e-4)
    assert float(out.figures["critic/return"]) == pytest.approx(returns.mean(), abs=1e-5)
    assert float(out.figures["kl_in_reward"]) == pytest.approx(0.3 * k1.sum() / ROWS, abs=1e-5)


def test_credit_of_groups_takes_the_kl_of_the_whole_completion_from_its_reward():
    config = config_for("rloo")
    draw = np.random.default_rng(4)
    mask = np.arange(LIMIT) < draw.integers(0, LIMIT + 1, ROWS)[:, None]
    k1, reward = draw.standard_normal((ROWS, LIMIT)), draw.standard_normal((4, 4))
    creditor = Creditor(config.algorithm, ROWS, LIMIT, small_model(1)[0].compute.mesh)
    tokens = Tokens(jnp.asarray(mask), jnp.asarray(mask), jnp.asarray(k1 * mask), None)
    out = creditor.credit([tokens], reward, np.ones((4, 4), bool), mask.sum(1).reshape(4, 4), None, np.float32(0.3))
    charged = reward - 0.3 * (k1 * mask).sum(1).reshape(4, 4)
    expected = (charged - (charged.sum(1, keepdims=True) - charged) / 3).reshape(-1, 1) * mask
    np.testing.assert_allclose(out.advantages, expected, atol=1e-5)
    assert out.returns is None and float(out.figures["kl_in_reward"]) == pytest.approx(0.3 * (k1 * mask).sum() / ROWS)


def test_credit_finds_its_way_back_into_the_rows_of_every_update():
    tables = []
    for minibatches, batch in ((1, {}), (2, {"rows": "packed", "row_len": 16})):
        config = config_for("ppo", optim={"minibatches": minibatches}, batch=batch)
        learning = learning_for(config)
        collected = collected_for(config)
        parts, _ = learning._pack(collected)
        value = [jnp.where(part.sample_ids >= 0, jnp.sin(part.tokens + part.places), 0.0) for part in parts]
        parts = [replace(part, old_values=x) for part, x in zip(parts, value, strict=True)]
        lengths = collected.rollout.completion_len
        parts, scored, _ = learning.creditor.assign(parts, collected.scored, lengths, np.float32(0))
        back = [learning.creditor.tokens(replace(part, old_values=part.advantages)).values for part in parts]
        again = [learning.creditor.tokens(replace(part, old_values=part.returns)).values for part in parts]
        tables.append([np.concatenate(back), np.concatenate(again), scored.advantages])
        assert all((np.asarray(part.advantages)[np.asarray(part.sample_ids) < 0] == 0).all() for part in parts)
    for one, other in zip(*tables, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(
        tables[0][0].sum(1), tables[0][2] * np.maximum(rollout_for().completion_len, 1), atol=1e-4
    )
    assert len(np.unique(tables[0][0])) > 20


def test_a_shared_trunk_feels_the_value_loss_as_far_as_value_coef_lets_it():
    """The head starts at 0, where the trunk feels nothing; so it is set first."""
    updates, heads = [], []
    for critic in ({}, {"shared_trunk": True, "value_coef": 0.0}, {"shared_trunk": True, "value_coef": 1.0}):
        config = config_for("ppo", critic=critic)
        learning = learning_for(config)
        params = learning.state.critic.params | {"head": jnp.full(16, 0.1, jnp.float32)}
        learning.state = replace(learning.state, critic=replace(learning.state.critic, params=params))
        before = copied(learning.state)
        _, figures = learning.train(collected_for(config))
        assert figures["critic/value_loss"] > 0 and figures["critic/skipped_update_count"] == 0
        updates.append(moved(before.params, learning.params))
        heads.append(np.asarray(learning.state.critic.params["head"] - before.critic.params["head"]))
        assert set(learning.state.critic.params) == ({"head"} if critic else {"head", "trunk"})
    assert_same_update(updates[0], updates[1])
    np.testing.assert_allclose(heads[1], heads[0], atol=1e-5)
    np.testing.assert_allclose(heads[2], heads[0], atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(updates[1], updates[2], strict=True)) > 1e-3


@pytest.fixture(scope="module")
def trained():
    """A critic that looks at one rollout again and again, with a reference that follows and a KL that adapts."""
    config = config_for(
        "ppo",
        steps=40,
        critic={"learning_rate": 0.02, "eps": 1e-8, "value_clip": None},
        optim={"learning_rate": 1e-4},
        algorithm={
            "loss": {"kl_coef": 0.01},
            "reference_follow": {"every": 2},
            "adaptive_kl": {"target": 0.1},
        },
    )
    learning = learning_for(config)
    batch = collected_for(config)
    figures = [learning.train(batch)[1] for _ in range(30)]
    return config, learning, figures


def test_the_critic_learns_to_explain_the_returns(trained):
    _, _, figures = trained
    assert figures[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert figures[0]["critic/value"] == 0 and figures[-1]["critic/explained_variance"] > 0.6
    assert figures[-1]["critic/value_loss"] < 0.5 * figures[0]["critic/value_loss"]
    assert figures[-1]["critic/value"] == pytest.approx(figures[-1]["critic/return"], abs=0.2)
    assert {"critic/grad_norm", "critic/learning_rate", "critic/value_clip_ratio"} <= set(figures[0])


def test_critic_reference_and_controllers_are_part_of_the_checkpoint(trained, tmp_path):
    config, learning, _ = trained
    store = CheckpointStore(tmp_path, 1)
    learning.save(store, 30, {"step": 30})
    store.wait()
    saved = jax.tree.map(np.asarray, copied(learning.state))
    _, whole = learning.train(collected_for(config, 1))
    ended = jax.tree.map(np.asarray, copied(learning.state))
    assert np.abs(ended.critic.params["head"] - saved.critic.params["head"]).max() > 0
    again = learning_for(config)
    again.learner, again.critic, again.creditor = learning.learner, learning.critic, learning.creditor  # compiled
    assert again.restore(store, 30)["step"] == 30
    jax.tree.map(np.testing.assert_array_equal, saved, jax.tree.map(np.asarray, again.state))
    _, figures = again.train(collected_for(config, 1))
    jax.tree.map(np.testing.assert_array_equal, ended, jax.tree.map(np.asarray, again.state))
    assert figures == whole
    store.close()


def test_a_rollout_that_no_function_scored_does_not_move_the_critic(trained):
    config, learning, _ = trained
    batch = collected_for(config)
    silent = replace(batch.scored, scored=np.zeros_like(batch.scored.scored))
    before = jax.tree.map(np.asarray, copied(learning.state.critic))
    _, figures = learning.train(replace(batch, scored=silent))
    assert figures["critic/skipped_update_count"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, learning.state.critic))


class Kill(Callback):
    """Ends the process of a run, as far as a test can, before its second step is saved."""

    def on_step(self, step):
        """Die."""
        if step.step == 2:
            raise KeyboardInterrupt  # any other error of a callback is warned of


@pytest.mark.slow
def test_a_ppo_run_that_died_ends_bitwise_as_one_that_did_not(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
    rows = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(2)]

    def run(name, *callbacks):
        config = TrainConfig.from_tables(
            {
                "steps": 3,
                "output_dir": str(tmp_path / name),
                "compilation_cache": None,
                "rollout": {"prompts_per_step": 4, "num_samples": 2, "max_new_tokens": 4},
                "algorithm": {"preset": "ppo", "loss": {"kl_coef": 0.05, "kl_in_reward": True}},
                "critic": {"learning_rate": 1e-3},
                "optim": {"learning_rate": 3e-3, "epochs": 2},
                "mesh": {"fsdp": 4},
                "checkpoint": {"every": 1},
                "log": {"quiet": True, "report": False},
            }
        )
        reward = lambda prompts, completions, **_: [float(sum(c.isdigit() for c in text)) for text in completions]  # noqa: E731
        Trainer(checkpoint, reward, rows, config=config, callbacks=callbacks).train()

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("died", Kill())
    run("died")
    steps = [
        [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second", "compile"))}
            for row in read_json_lines(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "died")
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 3
    for row in steps[0]:
        assert np.isfinite([row["critic/explained_variance"], row["critic/value_loss"], row["kl_in_reward"]]).all()
        assert row["critic/return"] != 0 and row["kl_in_reward"] != 0 or row["step"] == 1
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "died")]
    assert weights[0] == weights[1]
    lines = read_json_lines(tmp_path / "whole" / "completions.jsonl")
    assert any(line["advantage"] != 0 for line in lines)
