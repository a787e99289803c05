"""Every public function under jit, vmap over seeds and checkpoint; nothing compiles twice; nothing calls the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but

from grpo_jax import algo
from grpo_jax.algo import spec

Q, G, N, T, F = 3, 4, 12, 5, 2
DRAWS = {
    "rewards": lambda key: jax.random.normal(key, (Q, G)),
    "by_function": lambda key: jax.random.normal(key, (F, Q, G)),
    "lengths": lambda key: jax.random.randint(key, (Q, G), 1, 9),
    "row_rewards": lambda key: jax.random.normal(key, (N,)),
    "logp": lambda key: -jnp.abs(jax.random.normal(key, (N, T))),
    "advantages": lambda key: jax.random.normal(key, (N,)),
    "hidden": lambda key: jax.random.normal(key, (N, 3)),
    "unembed": lambda key: jax.random.normal(key, (3, 11)),
    "scalar": lambda key: jax.random.uniform(key),
    "key": lambda key: key,
}
MASK = jnp.arange(T) < jnp.array([5, 3, 0, 4] * 3)[:, None]
SEGMENTS = jnp.where(jnp.arange(T) < 2, 4, 2) * MASK
TARGETS = jnp.arange(N) % 11
CHOOSING = algo.LossConfig(surrogate="clip_cov", clip_cov_low=-5.0, clip_cov_share=0.3, entropy_top=0.5)


def loss(config, **fixed):
    """A policy loss of (logp, old_logp, advantages [N, T], ref_logp, sampler_logp, entropy), with its gradient."""

    def call(logp, old_logp, advantages, ref_logp, sampler_logp, entropy):
        def value(x):
            more = dict(ref_logp=ref_logp, sampler_logp=sampler_logp, entropy=-entropy, key=jax.random.key(0)) | fixed
            return algo.policy_loss(x, old_logp, advantages, MASK, config, **more)

        return jax.value_and_grad(value, has_aux=True)(logp)

    return call


def head(**sizes):
    def call(hidden, unembed):
        def value(h, w):
            logp, entropy = algo.logprobs_and_entropy(h, w, TARGETS, **sizes)
            return jnp.sum(jnp.sin(logp) + jnp.cos(entropy))

        return jax.value_and_grad(value, (0, 1))(hidden, unembed)

    return call


def values(values, old_values, returns):
    return jax.value_and_grad(lambda v: algo.value_loss(v, old_values, returns, MASK), has_aux=True)(values)


def estimators(x, log_ratio):
    """Every KL estimator with its gradient."""

    def total(x, name):
        kl = algo.KL_ESTIMATORS[name](x, jnp.exp(log_ratio))
        return jnp.sum(kl), kl

    return {name: jax.grad(total, has_aux=True)(x, name) for name in algo.KL_ESTIMATORS}


def estimator(name):
    def call(rewards, lengths):
        options = {"k": 2, "greedy": jnp.zeros(Q), "lengths": lengths}
        return algo.group_advantages(rewards, estimator=name, **options)

    return call


LOSS = ("logp", "logp", "advantages", "logp", "logp", "logp")
CASES = {f"loss {name}": (loss(recipe.loss), LOSS) for name, recipe in algo.PRESETS.items()}
CASES |= {
    f"loss {name} with all": (
        loss(algo.LossConfig(surrogate=name, correction="tis", veto=1e-3, off_policy_threshold=0.1, entropy_coef=0.1)),
        LOSS,
    )
    for name in ("clip_cov", "kl_cov", "dppo", "vespo")
}
CASES |= {
    f"loss {name} packed": (
        loss(algo.LossConfig(correction=name, correction_high=2.0, entropy_top=0.5), segments=SEGMENTS),
        (*LOSS[:2], "logp", *LOSS[3:]),
    )
    for name in algo.CORRECTIONS
}
CASES["loss clip_cov by key"] = (
    lambda key, *rest: loss(CHOOSING, key=key)(*rest),
    ("key", *LOSS),
)
CASES |= {
    f"advantages {name}": (estimator(name), ("by_function" if name == "gdpo" else "rewards", "lengths"))
    for name in algo.ADVANTAGES
}
CASES |= {
    "logprobs plain": (head(), ("hidden", "unembed")),
    "logprobs chunked": (head(token_chunk=5, vocab_chunk=4), ("hidden", "unembed")),
    "combine_rewards": (algo.combine_rewards, ("by_function",)),
    "soft_overlong": (lambda x: algo.soft_overlong(x, 9), ("lengths",)),
    "overlong_filter": (lambda x: algo.overlong_filter(MASK, x > 0), ("row_rewards",)),
    "has_spread": (lambda x: algo.has_spread(x, x > 0.3), ("rewards",)),
    "whiten": (lambda x: algo.whiten(x, MASK), ("logp",)),
    "clip_symmetric": (lambda x: algo.clip_symmetric(x, 0.3), ("rewards",)),
    "kl_in_reward": (lambda r, x, y: algo.kl_in_reward(r, x, y, MASK, 0.1), ("rewards", "logp", "logp")),
    "KL estimators": (estimators, ("logp", "logp")),
    "gae": (lambda r, v: algo.gae(r, v, MASK), ("row_rewards", "logp")),
    "value_loss": (values, ("logp", "logp", "logp")),
    "denominators": (lambda x: algo.denominators(algo.LossConfig(), x < -0.5, SEGMENTS), ("logp",)),
    "choose": (
        lambda key, x, a, h: algo.choose(CHOOSING, MASK, logp=x, advantages=a, entropy=h, key=key),
        ("key", "logp", "advantages", "logp"),
    ),
    "adaptive_kl": (lambda b, k: algo.adaptive_kl(b, k, target=0.1, horizon=100, completions=N), ("scalar", "scalar")),
    "adaptive_entropy": (
        lambda c, h: algo.adaptive_entropy(algo.EntropyController(c, jnp.array(True)), h, target=0.5),
        ("scalar", "scalar"),
    ),
    "follow_reference": (lambda x, y: algo.follow_reference({"w": x}, {"w": y}, 512), ("hidden", "hidden")),
}


def arguments(name, seed):
    keys = jax.random.split(jax.random.key(seed), len(CASES[name][1]))
    return tuple(DRAWS[kind](key) for kind, key in zip(CASES[name][1], keys, strict=True))


def test_every_public_function_is_among_the_cases():
    functions = {name for name in algo.__all__ if callable(getattr(algo, name)) and name[0].islower()}
    named = {case.split()[0] for case in CASES} | {"policy_loss", "group_advantages", "logprobs_and_entropy"}
    assert functions <= named


FAST = {"loss gspo", "loss vespo with all", "loss geo_gate packed", "loss clip_cov by key"}
FAST |= {"advantages gdpo", "advantages pass_at_k", "advantages reinforce_pp", "logprobs chunked"}
FAST |= {name for name in CASES if name.split()[0] not in ("loss", "advantages", "logprobs")}


@pytest.mark.parametrize("name", slow_but(FAST, CASES))
def test_jit_vmap_and_checkpoint(name):
    """One compilation serves all calls of these shapes, and equals vmap over seeds and a recomputing pass."""
    function, traces = CASES[name][0], []

    def traced(*inputs):
        traces.append(None)
        return jax.checkpoint(function)(*inputs)

    compiled = jax.jit(traced)
    each = [compiled(*arguments(name, seed)) for seed in (0, 1)]
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(arguments(name, seed) for seed in (0, 1)))
    together = jax.jit(jax.vmap(function))(*stacked)
    expected = jax.tree.map(lambda *x: np.stack(x), *each)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), together, expected)
    assert any(np.isfinite(x).any() and np.any(x[0] != x[1]) for x in jax.tree.leaves(expected)), "seeds change nothing"
    text = compiled.lower(*arguments(name, 0)).as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text


def test_an_equal_config_is_the_same_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def call(config, logp):
        traces.append(config)
        return algo.policy_loss(logp, None, jnp.ones(N), MASK, config)[0]

    logp = arguments("loss dapo", 0)[0]
    for high in (0.28, 0.28, 0.3):
        call(algo.LossConfig.preset("dapo", clip_high=high), logp)
    assert len(traces) == 2 and isinstance(traces[0], spec.LossConfig)


def test_moving_coefficients_compile_once():
    traces = []

    @jax.jit
    def call(logp, kl_coef, entropy_coef):
        traces.append(None)
        config = algo.LossConfig(kl_coef=0.5, entropy_coef=0.5)
        more = dict(ref_logp=logp - 0.1, entropy=-logp, kl_coef=kl_coef, entropy_coef=entropy_coef)
        return algo.policy_loss(logp, None, jnp.zeros(N), MASK, config, **more)[0]

    logp = jnp.full((N, T), -0.25)
    k3 = np.exp(-0.1) + 0.1 - 1
    for kl_coef, entropy_coef in ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0)):
        got = call(logp, kl_coef, entropy_coef)
        np.testing.assert_allclose(got, kl_coef * k3 - entropy_coef * 0.25, rtol=0, atol=1e-6)
    assert len(traces) == 1
