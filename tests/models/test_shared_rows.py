"""Group rows, cut into a prompt and blocks: what every column reads, and its gradient, are those of a dense mask."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from jax.extend.core import jaxprs_in_params
from model_cases import FAMILY_CASES, random_model, random_tokens, relative

from grpo_jax.batching import layout_for, pack
from grpo_jax.models import Model
from grpo_jax.models.attention import attend, segment_mask
from grpo_jax.types import Rollout

PROMPT, LIMIT, SAMPLES = 5, 7, 3
NOISE = 1e-5
"""Float32 noise, relative to the largest; a leak or a column not seen would be 1e-2 and more."""


HIDDEN = jax.jit(Model.hidden, static_argnums=(0, 6))


def _batch(row_len=None):
    """Four groups: empty completions, of one token, at the limit; prompts of one token and of five."""
    start = np.repeat(np.array([5, 1, 4, 2], np.int32), SAMPLES)
    length = np.array([7, 7, 7, 1, 0, 4, 0, 0, 0, 3, 6, 2], np.int32)
    tokens = random_tokens((len(start), PROMPT + LIMIT))
    for n in range(len(start)):
        tokens[n, : start[n]] = tokens[n - n % SAMPLES, : start[n]]
    finish = np.where(length < LIMIT, "stop", "length")
    rollout = Rollout(tokens, start, length, np.zeros(tokens.shape, np.float32), finish)
    layout = layout_for("group", PROMPT, LIMIT, len(start), SAMPLES, row_len=row_len)
    return pack(rollout, np.ones(len(start), np.float32), rollout.completion_mask, layout)


@partial(jax.jit, static_argnums=(0, 4))
def _gradient(model, params, rows, weight, shared):
    loss = lambda p: (model.hidden(p, *rows, shared) * weight).sum()  # noqa: E731
    return jax.grad(loss)(params)


FAST = ("llama", "gemma2", "gemma3", "smollm3", "qwen3_moe")


@pytest.mark.parametrize("family", slow_but(FAST, ("qwen2", "llama", *FAMILY_CASES)))
def test_each_family_reads_what_a_dense_mask_lets_it(family):
    """Windows, soft-caps, shared key heads, rotaries by layer and experts among them."""
    model, params = random_model(**FAMILY_CASES.get(family, {"model_type": family}), num_hidden_layers=2)
    batch = _batch()
    *rows, shared = batch.rows
    dense, got = (HIDDEN(model, params, *rows, how) for how in (None, shared))
    there = batch.segment_ids > 0
    assert there.sum() > 40 and np.isfinite(got).all()
    assert relative(got[there], dense[there]) < NOISE


LENGTHS = {"split groups": PROMPT + LIMIT, "wide blocks": PROMPT + 2 * LIMIT + 3}
ROWS = itertools.product(("gemma2", "mixtral"), LENGTHS)


@pytest.mark.parametrize(("family", "length"), slow_but({("gemma2", "split groups"), ("mixtral", "wide blocks")}, ROWS))
def test_gradients_are_those_of_a_dense_mask(family, length):
    row_len = LENGTHS[length]
    model, params = random_model(**FAMILY_CASES[family], num_hidden_layers=2)
    batch = _batch(row_len)
    *rows, shared = batch.rows
    assert shared.block_len == (LIMIT if row_len == PROMPT + LIMIT else LIMIT + 1)
    assert (batch.segment_ids[:, 0] > 0).sum() == (7 if row_len == PROMPT + LIMIT else 5)
    noise = np.random.default_rng(3).standard_normal((*batch.mask.shape, 32))
    weight = np.where(batch.segment_ids[..., None] > 0, noise, 0)
    want, got = (_gradient(model, params, rows, weight.astype(np.float32), how) for how in (None, shared))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert np.abs(one - other).max() < NOISE * largest


def test_rows_of_padding_alone_stay_finite_with_their_gradients():
    model, params = random_model(num_hidden_layers=1)
    *rows, shared = _batch().rows
    rows = [np.zeros_like(x) for x in rows]
    gradient = _gradient(model, params, rows, np.ones((*rows[0].shape, 32), np.float32), shared)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_in_bfloat16_too():
    model, params = random_model(model={"dtype": "bfloat16"}, num_hidden_layers=2)
    batch = _batch()
    *rows, shared = batch.rows
    dense, got = (np.asarray(HIDDEN(model, params, *rows, how), np.float32) for how in (None, shared))
    assert relative(got[batch.segment_ids > 0], dense[batch.segment_ids > 0]) < 2e-2


def test_parts_of_long_rows_are_the_whole():
    """Rows of more columns than go together, cut where the parts do not divide them; the last column too."""
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (draw((2, n, 1, *g, 4)).astype(np.float32) for n, g in ((300, (2,)), (310, ()), (310, ())))
    mask = segment_mask(jnp.ones((2, 310), jnp.int32), None, 10)
    compute = random_model(num_hidden_layers=1)[0].compute
    scores = jnp.where(mask[:, None, None], jnp.einsum("ntkgd,nskd->nkgts", q, k, precision="highest"), -jnp.inf)
    want = jnp.einsum("nkgts,nskd->ntkgd", jax.nn.softmax(scores), v, precision="highest")
    assert relative(attend(compute, q, k, v, mask, None), want) < NOISE
    assert relative(want[:, -1], want[:, -2]) > 1e-2


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _shapes(inner)


def test_no_scores_of_whole_rows_are_made():
    """What grows with the square of a row's length would have two axes of it, or the square of the blocks."""
    model, params = random_model(num_hidden_layers=1)
    prompt, limit, width = 16, 13, 16 + 8 * 13
    shared = layout_for("group", prompt, limit, 8, 8, row_len=width).shared
    rows = [jnp.ones((2, width), jnp.int32)] * 4

    def most(how):
        loss = lambda p: model.hidden(p, *rows, how).sum()  # noqa: E731
        shapes = list(_shapes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
        return max(int(np.prod(shape)) for shape in shapes if len(shape) > 3)

    heads = 4
    assert most(None) == 2 * heads * width**2
    assert most(shared) == 2 * heads * 8 * limit * (prompt + limit)
