"""Advantages, reward shaping and controllers of algo/ held to values that TRL 1.16's own code gave, and the packed loss
of its asynchronous trainer. Differences are stated and asserted; docs/TRL_DIFFERENCES.md lists them.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo

from .cases import x64
from .trl_golden import ARRAYS, CASES, ESTIMATOR, META, combine, group_advantages, same


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
    assert (np.abs(trl[0]).max() < 1e-6) == (name != "none/huge32")


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

    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(data["logp"]))
    same(value, data["loss"][0], "float32")
    same(grad, data["grad"], "float32")


def test_combined_rewards_equal_the_sum_that_trl_normalises():
    """Weights are not renormalised over the functions that answered, and a sample without any answer is not scored."""
    for table, weights in (("pair", None), ("absent", np.array([1.0, 0.5]))):
        rewards = ARRAYS[f"rewards/{table}"]
        with x64():
            got = algo.combine_rewards(jnp.asarray(rewards), None if weights is None else jnp.asarray(weights))
        want, answered = combine(rewards, weights)
        same(got[0], want)
        assert (np.asarray(got[1]) == answered).all()
    assert not answered.all()


@pytest.mark.parametrize("name", [n for n in META["advantages"] if META["advantages"][n]["options"].get("beta")])
def test_kl_in_the_reward_equals_trl_rloo(name):
    """algo.kl_in_reward is the penalty that TRL's RLOO takes from the reward: the sum of k1 of the sampling policy."""
    record = META["advantages"][name]
    rewards, valid = combine(ARRAYS[f"rewards/{record['table']}"], record["weights"])
    rewards = np.clip(rewards, *record["options"].get("reward_clip_range", (-np.inf, np.inf)))
    with x64():
        old, ref, mask = (jnp.asarray(ARRAYS[f"advantages/{name}/{k}"]) for k in ("old", "ref", "mask"))
        rewards = algo.kl_in_reward(jnp.asarray(rewards), old, ref, mask, record["options"]["beta"])
    got = group_advantages(np.asarray(rewards), estimator="rloo", valid=valid)
    same(got, ARRAYS[f"advantages/{name}/advantages"])


def test_soft_overlong_equals_trl():
    lengths, options = ARRAYS["overlong/lengths"], META["soft_overlong"]
    with x64():
        got = algo.soft_overlong(
            jnp.asarray(lengths, jnp.float64), options["max_completion_len"], options["soft_punish_cache"]
        )
    same(got, ARRAYS["overlong/rewards"])
    with pytest.raises(ValueError, match="buffer"):  # TRL takes 0, a step from 0 to -1
        algo.soft_overlong(jnp.asarray(lengths), 40, 0)


def test_overlong_filter_masks_what_trl_masks():
    """TRL guesses truncation from the last token id; ours is told the finish reason. The masks are the same here."""
    for batch, name in (("cut", "dapo/truncated"), ("all_cut", "dapo/all_truncated")):
        lengths, finished = ARRAYS[f"batch/{batch}/lengths"], ARRAYS[f"batch/{batch}/finished"]
        completion = np.arange(CASES[name].mask.shape[1]) < lengths[:, None]
        got = np.asarray(algo.overlong_filter(jnp.asarray(completion), jnp.asarray(~finished)))
        assert (got == CASES[name].mask).all()
        assert (got != completion).any()


def test_reference_follows_as_in_trl():
    """One step of SyncRefModelCallback, and none where the update is not a k-th."""
    with x64():
        before, policy = jnp.asarray(ARRAYS["sync/before"]), jnp.asarray(ARRAYS["sync/policy"])
        same(algo.follow_reference(before, policy, 8, alpha=0.6, every=4), ARRAYS["sync/after"])
        same(algo.follow_reference(before, policy, 9, alpha=0.6, every=4), ARRAYS["sync/before"])


def test_adaptive_entropy_coefficient_equals_trl():
    """Ten steps: the coefficient after each, and the loss that says whether a step used it."""
    options, data = META["entropy_control"], {k.split("/")[1]: v for k, v in ARRAYS.items() if "control/" in k}
    mask, used = data["mask"], 0

    @jax.jit
    def loss_of(entropy, coef):
        return algo.policy_loss(*args, config, entropy=entropy, entropy_coef=coef)[0]

    with x64():
        config = algo.LossConfig(clip_low=options["epsilon"], clip_high=options["epsilon_high"])
        args = [jnp.asarray(data[k]) for k in ("logp", "old", "advantages", "mask")]
        state = algo.EntropyController(jnp.asarray(options["entropy_coef"], jnp.float64), jnp.asarray(False))
        for scale, coef, loss in zip(data["scale"], data["coef"], data["loss"], strict=True):
            entropy = jnp.asarray(data["entropy"] * scale)
            same(loss_of(entropy, state.effective), loss)
            used += bool(state.effective)
            limits = {"high": options["entropy_coef_max"], "delta": options["entropy_coef_delta"]}
            mean = (data["entropy"] * scale)[mask].mean()
            state = algo.adaptive_entropy(state, jnp.asarray(mean), target=options["entropy_target"], **limits)
            same(state.coef, coef)
    assert 0 < used < len(data["loss"])


def test_the_page_of_differences_names_tests_that_exist():
    page = Path(__file__).parents[2] / "docs" / "TRL_DIFFERENCES.md"
    named = re.findall(r"\b([LA]) `(\w+)`", page.read_text(encoding="utf-8"))
    files = {"L": Path(__file__).with_name("test_trl.py"), "A": Path(__file__)}
    for file, name in named:
        assert f"def test_{name}(" in files[file].read_text(encoding="utf-8"), name
    assert len(set(named)) > 20
