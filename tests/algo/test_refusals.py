"""What means nothing is refused, with the reason; MATH.md section 7 lists it."""

import dataclasses
import inspect
import math
import subprocess
import sys
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo
from grpo_jax.algo import spec
from grpo_jax.algo.refusals import RATIO_LEVELS

LOSSES = {
    "unknown surrogate": (dict(surrogate="trpo"), "ppo_clip"),
    "unknown level": (dict(ratio_level="word"), "sequence_token"),
    "unknown estimator": (dict(kl_estimator="k4"), "k3_unbiased"),
    "unknown aggregation": (dict(aggregation="mean"), "token_mean"),
    "unknown correction": (dict(correction="clip"), "icepop"),
    "negative clip_low": (dict(clip_low=-0.1), "clip_low"),
    "negative clip_high": (dict(clip_high=-1e-9), "clip_high"),
    "clip not a number": (dict(clip_high=math.nan), "number"),
    "clip a string": (dict(clip_high="0.2"), "number"),
    "constant without its constant": (dict(aggregation="constant"), "max_completion_len"),
    "a length that is none": (dict(aggregation="constant", max_completion_len=0), "at least 1"),
    "delta inside the clip": (dict(delta=1.19), "clip_high"),
    "delta without an upper clip": (dict(delta=4.0, clip_high=None), "clip_high"),
    "delta elsewhere": (dict(surrogate="cispo", delta=4.0), "ppo_clip"),
    "dual_clip of one": (dict(dual_clip=1.0), "above 1"),
    "dual_clip elsewhere": (dict(surrogate="sapo", dual_clip=3.0), "ppo_clip"),
    "delta with dual_clip": (dict(delta=4.0, dual_clip=4.0), "one of them"),
    "KL in both": (dict(kl_coef=0.1, kl_in_reward=0.1), "not in both"),
    "negative KL": (dict(kl_coef=-0.1), "kl_coef"),
    "no KL coefficient": (dict(kl_coef=None), "default 0.0"),
    "gmpo by entropy": (dict(surrogate="gmpo", entropy_top=0.2), "sequence"),
    "no tokens kept": (dict(entropy_top=0.0), "entropy_top"),
    "more than all tokens": (dict(entropy_top=1.1), "at most 1"),
    "vespo twice weighted": (dict(surrogate="vespo", correction="seq_mask"), "'icepop'"),
    "vespo without decay": (dict(surrogate="vespo", vespo_lambda_pos=0.0), "0.0001"),
    "geo_tis without its bound": (dict(correction="geo_tis"), "correction_high"),
    "geo_mask without bounds": (dict(correction="geo_mask"), "correction_low"),
    "bounds crossed": (dict(correction="icepop", correction_low=6.0), "low <= high"),
    "no covariance between": (dict(surrogate="clip_cov", clip_cov_low=5.0), "clip_cov_low"),
    "sapo at zero": (dict(surrogate="sapo", sapo_tau_pos=0.0), "above 0"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_mean_nothing(name):
    fields, reason = LOSSES[name]
    with pytest.raises(ValueError, match=r"^got .+: .+\. .+\.$") as error:
        algo.LossConfig(**fields)
    assert reason in str(error.value)


@pytest.mark.parametrize("surrogate", get_args(spec.Surrogate))
@pytest.mark.parametrize("level", get_args(spec.RatioLevel))
def test_a_level_is_taken_exactly_where_the_surrogate_has_it(surrogate, level):
    if level in RATIO_LEVELS[surrogate]:
        assert algo.LossConfig(surrogate=surrogate, ratio_level=level).ratio_level == level
    else:
        with pytest.raises(ValueError, match=f"{surrogate}.*{level}.*: .*Use ratio_level"):
            algo.LossConfig(surrogate=surrogate, ratio_level=level)


def test_bounds_themselves_are_legal():
    assert algo.LossConfig(clip_low=0.0, clip_high=0.0).clip_high == 0.0
    assert algo.LossConfig(clip_low=math.inf, clip_high=math.inf).clip_low == math.inf
    assert algo.LossConfig(delta=1.2).delta == 1.2
    assert algo.LossConfig(entropy_top=1.0, surrogate="gmpo").entropy_top == 1.0


RECIPES = {
    "unknown advantage": (dict(advantage="ppo"), "gae"),
    "unknown weight": (dict(weight="words"), "tokens"),
    "ddof of two": (dict(ddof=2), "1 or 0"),
    "eps below zero": (dict(eps=-1e-4), "eps"),
    "gamma above one": (dict(gamma=1.01), "at most 1"),
    "lambda below zero": (dict(lam=-0.1), "lam"),
    "best of none": (dict(advantage="pass_at_k", pass_k=0), "at least 1"),
    "best of unsaid": (dict(advantage="pass_at_k"), "pass_k"),
    "clip to nothing": (dict(reward_clip=0.0), "above 0"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_mean_nothing(name):
    fields, reason = RECIPES[name]
    with pytest.raises(ValueError, match="^got ") as error:
        algo.Recipe(**fields)
    assert reason in str(error.value)


def test_runs_that_a_recipe_cannot_have():
    with pytest.raises(ValueError, match="gae.*critic"):
        algo.PRESETS["ppo"].check_run(group_size=8)
    algo.PRESETS["ppo"].check_run(group_size=8, updates_per_rollout=4, has_critic=True)
    with pytest.raises(ValueError, match="reinforce.*no ratio"):
        algo.PRESETS["rloo"].check_run(group_size=8, updates_per_rollout=2)
    algo.PRESETS["rloo"].check_run(group_size=8)
    with pytest.raises(ValueError, match="smaller group"):
        algo.Recipe(advantage="pass_at_k", pass_k=9).check_run(group_size=8)


# MATH.md section 7: advantage, surrogate, level, clip_low, clip_high, KL, where the KL is, aggregation.
PRESET_TABLE = {
    "reinforce": ("raw", "reinforce", "token", None, None, 0, False, "seq_mean_token_sum"),
    "reinforce_baseline": ("batch_mean", "reinforce", "token", None, None, 0, False, "seq_mean_token_sum"),
    "ppo": ("gae", "ppo_clip", "token", 0.2, 0.2, 0, False, "token_mean"),
    "grpo": ("grpo", "ppo_clip", "token", 0.2, 0.2, 0.04, False, "seq_mean_token_mean"),
    "dr_grpo": ("dr_grpo", "ppo_clip", "token", 0.2, 0.2, 0, False, "constant"),
    "bnpo": ("grpo", "ppo_clip", "token", 0.2, 0.2, 0, False, "token_mean"),
    "dapo": ("grpo", "ppo_clip", "token", 0.2, 0.28, 0, False, "token_mean"),
    "gspo": ("grpo", "ppo_clip", "sequence", 3e-4, 4e-4, 0, False, "seq_mean_token_mean"),
    "gspo_token": ("grpo", "ppo_clip", "sequence_token", 3e-4, 4e-4, 0, False, "seq_mean_token_mean"),
    "luspo": ("grpo", "ppo_clip", "sequence", 2e-3, 2.5e-3, 0, False, "seq_mean_token_sum"),
    "cispo": ("grpo", "cispo", "token", None, 4.0, 0, False, "token_mean"),
    "sapo": ("grpo", "sapo", "token", None, None, 0, False, "seq_mean_token_mean"),
    "gmpo": ("grpo", "gmpo", "token", 0.4, 0.4, 0, False, "seq_mean_token_mean"),
    "vespo": ("grpo", "vespo", "token", None, None, 0, False, "token_mean"),
    "rloo": ("rloo", "reinforce", "token", None, None, 0.05, True, "seq_mean_token_sum"),
    "reinforce_pp": ("reinforce_pp", "ppo_clip", "token", 0.2, 0.2, 0.01, True, "token_mean"),
    "remax": ("remax", "reinforce", "token", None, None, 0, False, "seq_mean_token_sum"),
    "opo": ("opo", "reinforce", "token", None, None, 0, False, "token_mean"),
    "lite_ppo": ("lite_ppo", "ppo_clip", "token", 0.2, 0.2, 0, False, "token_mean"),
    "gpg": ("gpg", "reinforce", "token", None, None, 0, False, "token_mean"),
    "gdpo": ("gdpo", "ppo_clip", "token", 0.2, 0.2, 0, False, "seq_mean_token_mean"),
}
UNUSED_CLIP = {"reinforce", "sapo", "vespo", "kl_cov"}


@pytest.mark.parametrize("name", algo.PRESETS)
def test_a_preset_is_its_row_and_nothing_else(name):
    recipe = algo.PRESETS[name]
    advantage, surrogate, level, low, high, kl, in_reward, aggregation = PRESET_TABLE[name]
    assert (recipe.name, recipe.advantage) == (name, advantage)
    named = dict(surrogate=surrogate, ratio_level=level, kl_coef=kl, kl_in_reward=in_reward, aggregation=aggregation)
    named |= {} if surrogate in UNUSED_CLIP else dict(clip_low=low, clip_high=high)
    named |= dict(kl_estimator="k1") if in_reward else {}
    named |= dict(max_completion_len=3000) if aggregation == "constant" else {}
    assert recipe.loss == algo.LossConfig(**named)
    assert recipe.whiten == (name == "ppo") and (recipe.gamma, recipe.lam) == (1.0, 0.95)
    assert (recipe.dynamic_sampling, recipe.soft_overlong, recipe.overlong_filter) == (name == "dapo",) * 2 + (False,)
    assert (recipe.ddof, recipe.eps, recipe.reward_clip, recipe.advantage_clip) == (1, 1e-4, None, None)
    assert recipe.critic == (name == "ppo") and recipe.greedy_baseline == (name == "remax")


def test_presets_by_name():
    assert algo.LossConfig.preset("dapo", clip_high=0.3) == algo.LossConfig(clip_high=0.3)
    for name, recipe in algo.PRESETS.items():
        assert algo.LossConfig.preset(name) == recipe.loss and hash(recipe) == hash(dataclasses.replace(recipe))
        assert recipe.source, f"{name} says nowhere where it comes from"
    with pytest.raises(ValueError, match="no such name.*dapo"):
        algo.LossConfig.preset("dapi")
    with pytest.raises(ValueError, match="no such field.*clip_high"):
        algo.LossConfig.preset("dapo", epsilon_high=0.3)


SIGNATURES = {
    "group_advantages": "rewards * estimator valid lengths greedy k weights ddof eps",
    "policy_loss": "logp old_logp advantages mask config * ref_logp sampler_logp entropy segments denominators key",
    "denominators": "config mask segments sequences",
}
"""What others call these functions with; what comes after is optional."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_others_call_keeps_its_arguments(name):
    parameters = inspect.signature(getattr(algo, name)).parameters
    names = list(parameters)
    before, _, after = (part.split() for part in SIGNATURES[name].partition("*"))
    assert names[: len(before)] == before and names[len(before) :][: len(after)] == after
    assert all(parameters[n].kind is inspect.Parameter.KEYWORD_ONLY for n in after)
    rest = names[len(before) + len(after) :]
    assert all(parameters[n].default is not inspect.Parameter.empty for n in rest)


def test_the_fields_of_a_loss():
    assert " ".join(f.name for f in dataclasses.fields(algo.LossConfig)) == (
        "surrogate ratio_level clip_low clip_high delta dual_clip sapo_tau_pos sapo_tau_neg vespo_k_pos"
        " vespo_lambda_pos vespo_k_neg vespo_lambda_neg clip_cov_share clip_cov_low clip_cov_high kl_cov_share"
        " kl_cov_coef kl_coef kl_estimator kl_in_reward aggregation max_completion_len correction correction_low"
        " correction_high veto off_policy_threshold entropy_top entropy_coef"
    )


@pytest.mark.parametrize("record", [algo.LossConfig, algo.Recipe])
def test_every_field_is_documented(record):
    for field in dataclasses.fields(record):
        assert len(field.metadata["doc"]) > 20 and field.metadata["doc"].endswith("."), field.name


def group(name, **options):
    return lambda: algo.group_advantages(jnp.zeros((2, 4)), estimator=name, **options)


def loss(config=None, advantages=(2,), **arguments):
    rows = jnp.zeros((2, 3))
    config = algo.LossConfig(**(config or {}))
    return lambda: algo.policy_loss(rows, rows, jnp.zeros(advantages), jnp.ones((2, 3), bool), config, **arguments)


CALLS = {
    "unknown estimator": (group("mean"), "dr_grpo"),
    "gae without a critic": (group("gae"), "algo.gae"),
    "remax without greedy": (group("remax"), "greedy"),
    "opo without lengths": (group("opo"), "lengths"),
    "pass_at_k without k": (group("pass_at_k"), "Give k"),
    "pass_at_k of more than there are": (group("pass_at_k", k=5), "1 <= k <= G"),
    "pass_at_k of none": (group("pass_at_k", k=0), "1 <= k <= G"),
    "token weights without lengths": (group("reinforce_pp", weights="tokens"), "lengths"),
    "unknown weights": (group("reinforce_pp", weights="words"), "tokens"),
    "ddof of two": (group("grpo", ddof=2), "1 or 0"),
    "advantages [N] with segments": (loss(segments=jnp.ones((2, 3), int)), "[N, T]"),
    "KL without reference": (loss(dict(kl_coef=0.1)), "ref_logp"),
    "moving KL without reference": (loss(kl_coef=0.1), "ref_logp"),
    "correction without sampler": (loss(dict(correction="tis")), "sampler_logp"),
    "veto without sampler": (loss(dict(veto=1e-4)), "sampler_logp"),
    "bonus without entropy": (loss(dict(entropy_coef=0.1)), "entropy"),
    "entropy_top without entropy": (loss(dict(entropy_top=0.2)), "entropy"),
    "clip_cov without a key": (loss(dict(surrogate="clip_cov")), "key"),
    "soft overlong without room": (lambda: algo.soft_overlong(jnp.ones(2), 10, buffer_len=0), "buffer_len"),
    "soft overlong beyond the limit": (lambda: algo.soft_overlong(jnp.ones(2), 10, buffer_len=11), "buffer_len"),
    "value clip without old values": (
        lambda: algo.value_loss(jnp.ones((1, 2)), None, jnp.ones((1, 2)), jnp.ones((1, 2), bool)),
        "old_values",
    ),
    "packed gae by row": (
        lambda: algo.gae(jnp.ones(1), jnp.ones((1, 2)), jnp.ones((1, 2), bool), segments=jnp.ones((1, 2), int)),
        "[N, T]",
    ),
    "cold temperature": (
        lambda: algo.logprobs_and_entropy(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.zeros(1, int), temperature=0.0),
        "temperature",
    ),
    "empty chunk": (
        lambda: algo.logprobs_and_entropy(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.zeros(1, int), vocab_chunk=0),
        "vocab_chunk",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_lack_something(name):
    call, reason = CALLS[name]
    with pytest.raises(ValueError, match="^got ") as error:
        call()
    assert reason in str(error.value)


def test_a_missing_greedy_reward_is_no_error():
    rewards = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    out = algo.group_advantages(rewards, estimator="remax", greedy=jnp.array([0.25, jnp.nan]))
    np.testing.assert_array_equal(out, [[0.75, -0.25], [0.0, 0.0]])


def test_the_specification_needs_no_jax():
    code = "import sys, grpo_jax.algo.spec, grpo_jax; assert not {'jax', 'numpy', 'chex'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_lazy_and_listed():
    for name in algo.__all__:
        assert getattr(algo, name) is not None
    assert set(dir(algo)) == set(algo.__all__)
    with pytest.raises(AttributeError, match="policy_los"):
        algo.policy_los  # noqa: B018
