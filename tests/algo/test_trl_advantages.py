"""Advantages, reward shaping and controllers of algo/ held to values that TRL 1.16's own code gave, and the packed loss
of its asynchronous trainer. Differences are stated and asserted; docs/TRL_DIFFERENCES.md lists them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo

from .trl_golden import ARRAYS, ESTIMATOR, META, combine, group_advantages, same


def trl_estimator(record):
    if record["trainer"] == "rloo":
        return "rloo"
    gdpo = record["options"].get("multi_objective_aggregation") == "normalize_then_sum"
    return "gdpo" if gdpo else ESTIMATOR[record["options"].get("scale_rewards", "group")]


def shaped(name):
    """Rewards and what was scored, as TRL's options combine, clip and penalise them."""
    record = META["advantages"][name]
    rewards, valid = combine(ARRAYS[f"rewards/{record['table']}"], record["weights"])
    clip = record["options"].get("reward_clip_range")
    rewards = np.clip(rewards, *clip) if clip else rewards
    if record["options"].get("beta"):
        old, ref, mask = (ARRAYS[f"advantages/{name}/{k}"] for k in ("old", "ref", "mask"))
        rewards = rewards - record["options"]["beta"] * ((old - ref) * mask).sum(1).reshape(rewards.shape)
    return rewards, valid


def our_advantages(name):
    record = META["advantages"][name]
    estimator, dtype = trl_estimator(record), record["options"].get("dtype", "float64")
    if estimator == "gdpo":
        rewards = ARRAYS[f"rewards/{record['table']}"]
        weights = np.ones(len(rewards)) if record["weights"] is None else np.array(record["weights"])
        return group_advantages(rewards, dtype, estimator="gdpo", valid=~np.isnan(rewards), weights=weights)
    rewards, valid = shaped(name)
    return group_advantages(rewards, dtype, estimator=estimator, valid=valid)


FLAT32 = [name for name in META["advantages"] if name.endswith("/tenths32")]
HUGE32 = [name for name in META["advantages"] if name.endswith("/huge32")]
NORMALIZED = [name for name in META["advantages"] if name.startswith("rloo_normalized/")]
EQUAL_ADVANTAGES = [n for n in META["advantages"] if n not in FLAT32 + HUGE32 + NORMALIZED]


@pytest.mark.parametrize("name", EQUAL_ADVANTAGES)
def test_advantages_equal_trl(name):
    """Weights, None rewards, groups of one, no spread; TRL's float32 rewards in float64 arithmetic."""
    same(our_advantages(name), ARRAYS[f"advantages/{name}/advantages"])


def spread_of(x, keep=None):
    """Standard deviation with Bessel's correction."""
    return np.std(x if keep is None else x[keep], ddof=1)


@pytest.mark.parametrize("name", FLAT32)
def test_equal_rewards_give_exact_zeros(name):
    """Ten float32 rewards of 0.1 in a group: TRL's subtraction leaves a residue, ours selects exactly 0."""
    trl, got = ARRAYS[f"advantages/{name}/advantages"], our_advantages(name)
    assert (trl[:2] != 0).all() and np.abs(trl[:2]).max() < 1e-4
    assert (got[:2] == 0).all()
    np.testing.assert_allclose(got[2], trl[2], rtol=0, atol=1e-4)  # TRL's residue enters its batch mean


@pytest.mark.parametrize("name", HUGE32)
def test_rewards_of_1e30_do_not_overflow(name):
    """float32: TRL squares 1e30, its deviation is inf and its advantages 0; ours scales before it squares."""
    trl, got, r = ARRAYS[f"advantages/{name}/advantages"], our_advantages(name), ARRAYS["rewards/huge"][0]
    centred = r - r.mean(1, keepdims=True)
    by_group = centred / (np.std(r, axis=1, ddof=1, keepdims=True) + 1e-4)
    want = {
        "group": by_group,
        "batch": centred / (spread_of(r) + 1e-4),
        "none": centred,
        "gdpo": (by_group - by_group.mean()) / (spread_of(by_group) + 1e-4),
    }[name.split("/")[0]]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want[1]).max())
    assert (trl[0] == 0).all() == (name != "none/huge32")


@pytest.mark.parametrize("name", NORMALIZED)
def test_rloo_normalized_over_the_batch_is_not_ours(name):
    """TRL can whiten RLOO's advantages over the batch, with eps 1e-4 and over groups of two scored samples or more.
    Our nearest is reinforce_pp_baseline: the same for full groups, but for its eps of 1e-8."""
    trl, plain = ARRAYS[f"advantages/{name}/advantages"], our_advantages(name)
    rewards, valid = shaped(name)
    counted = valid & (valid.sum(1, keepdims=True) > 1)
    same(trl, np.where(counted, (plain - plain[counted].mean()) / (spread_of(plain, counted) + 1e-4), 0.0))
    if counted.all():
        size = rewards.shape[1]
        centred = plain * (size - 1) / size
        white = group_advantages(rewards, estimator="reinforce_pp_baseline")
        same(white * (spread_of(centred) + 1e-8), centred)
        same(trl * (spread_of(plain) + 1e-4), white * (spread_of(centred) + 1e-8) * size / (size - 1))


@pytest.mark.parametrize("table", ["plain", "absent", "flat", "binary"])
def test_advantages_of_the_asynchronous_trainer(table):
    """It divides by the deviation of the population, with eps 1e-8: ddof=0, eps=1e-8 in ours."""
    rewards, valid = combine(ARRAYS[f"rewards/{table}"], None)
    got = group_advantages(rewards, estimator="grpo", valid=valid, ddof=0, eps=1e-8)
    same(got, ARRAYS[f"async_advantages/{table}"])


def test_packed_loss_of_the_asynchronous_trainer():
    """Three samples in one row of TRL's packing, float32: ours with segments."""
    data = {k.removeprefix("async/"): v for k, v in ARRAYS.items() if k.startswith("async/")}
    at, shape = data["index"], data["logp"].shape
    mask, segments = np.zeros(shape, bool), np.zeros(shape, np.int32)
    old, advantages = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    mask[0, at], segments[0, at] = True, data["segments"] + 1
    old[0, at], advantages[0, at] = data["old"], data["advantages"]
    config = algo.LossConfig(clip_low=META["async_loss"]["epsilon"], clip_high=META["async_loss"]["epsilon_high"])

    def loss(logp):
        args = (jnp.asarray(x) for x in (old, advantages, mask))
        return algo.policy_loss(logp, *args, config=config, segments=jnp.asarray(segments))[0]

    value, grad = jax.value_and_grad(loss)(jnp.asarray(data["logp"]))
    same(value, data["loss"][0], "float32")
    same(grad, data["grad"], "float32")
