"""Row kinds: padded, packed and group rows give each token the same hidden state; nothing leaks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from model_cases import FAMILY_CASES, HIDDEN, random_model, random_tokens, relative, whole_rows

PROMPT, FIRST, SECOND, WIDTH = 5, 4, 7, 18
NOISE = 1e-5
"""Float32 noise of a hidden state, relative to the largest; a leak would be 1e-2 and more."""


CASES = {
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama"},
    "windows": {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
}


@pytest.fixture(scope="module", params=CASES)
def setup(request):
    model, params = random_model(**CASES[request.param], num_hidden_layers=2)
    return model, params, partial(HIDDEN, model)


def _row(*pieces, width=WIDTH):
    """(tokens, first position, segment, context) -> tokens, positions, segment_ids, context_ids, each [1, width]."""
    row = np.zeros((4, 1, width), np.int32)
    at = 0
    for tokens, first, segment, context in pieces:
        end = at + len(tokens)
        row[0, 0, at:end] = tokens
        row[1, 0, at:end] = first + np.arange(len(tokens))
        row[2, 0, at:end], row[3, 0, at:end] = segment, context
        at = end
    return row


def test_padding_changes_nothing(setup):
    model, params, hidden = setup
    tokens = random_tokens((1, 9))
    padded = _row((tokens[0], 0, 1, 0))
    padded[0][:, 9:] = 3
    assert relative(hidden(params, *padded[:3])[:, :9], hidden(params, *whole_rows(tokens))) < NOISE


def test_packed_rows_equal_padded_rows(setup):
    model, params, hidden = setup
    first, second = random_tokens((6,), seed=1), random_tokens((8,), seed=2)
    packed = hidden(params, *_row((first, 0, 1, 0), (second, 0, 2, 0))[:3])
    for tokens, columns in ((first, slice(0, 6)), (second, slice(6, 14))):
        alone = hidden(params, *_row((tokens, 0, 1, 0))[:3])
        assert relative(packed[:, columns], alone[:, : len(tokens)]) < NOISE


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (7, 3)])
def test_packed_neighbours_do_not_leak(setup, order):
    model, params, hidden = setup
    left, right, other = (random_tokens((7,), seed=seed) for seed in (1, 2, 3))
    row = lambda a, b: hidden(params, *_row((a, 0, order[0], 0), (b, 0, order[1], 0))[:3])  # noqa: E731
    before, changed_left, changed_right = row(left, right), row(other, right), row(left, other)
    assert np.array_equal(before[:, 7:14], changed_left[:, 7:14])
    assert np.array_equal(before[:, :7], changed_right[:, :7])
    assert relative(changed_left[:, :7], before[:, :7]) > 1e-2


def test_group_rows_equal_padded_rows(setup):
    model, params, hidden = setup
    prompt, first, second = (random_tokens((n,), seed=n) for n in (PROMPT, FIRST, SECOND))
    group = _row((prompt, 0, 1, 0), (first, PROMPT, 2, 1), (second, PROMPT, 3, 1))
    got = hidden(params, *group)
    places = slice(PROMPT, PROMPT + FIRST), slice(PROMPT + FIRST, PROMPT + FIRST + SECOND)
    for tokens, place in zip((first, second), places, strict=True):
        alone = hidden(params, *_row((prompt, 0, 1, 0), (tokens, PROMPT, 1, 0))[:3])
        assert relative(got[:, place], alone[:, PROMPT : PROMPT + len(tokens)]) < NOISE
        assert relative(got[:, :PROMPT], alone[:, :PROMPT]) < NOISE
    changed = group.copy()
    changed[0, 0, places[0]] = random_tokens((FIRST,), seed=77)
    assert np.array_equal(hidden(params, *changed)[:, places[1]], got[:, places[1]])


@pytest.mark.parametrize("family", slow_but(("mistral", "gemma2", "gemma3", "smollm3", "qwen3_moe"), FAMILY_CASES))
def test_rows_of_each_family(family):
    """A prompt once with two completions, then another text: each as if it were alone, and no leak."""
    model, params = random_model(**FAMILY_CASES[family], num_hidden_layers=2)
    prompt, first, second = (random_tokens((n,), seed=n) for n in (4, 3, 6))
    pieces = [(prompt, 0, 1, 0), (first, 4, 2, 1), (second, 4, 3, 1), (second, 0, 4, 0)]
    changed = [*pieces[:2], (random_tokens((6,), seed=77), 4, 3, 1), pieces[3]]
    alone = [pieces[0], pieces[1]], [pieces[0], pieces[2]], [pieces[3]]
    rows = np.concatenate([_row(*p, width=21) for p in (pieces, changed, *alone)], 1)
    got, other, first_alone, second_alone, text = np.asarray(HIDDEN(model, params, *rows))
    want = [first_alone[:7], second_alone[4:10], text[:6]]
    assert relative(got[:19], np.concatenate(want)) < NOISE
    kept = [*range(7), *range(13, 19)]
    assert relative(other[kept], got[kept]) < NOISE
    assert relative(other[7:13], got[7:13]) > 1e-2


def test_context_zero_is_no_context(setup):
    model, params, hidden = setup
    row = _row((random_tokens((6,)), 0, 1, 0))
    assert relative(hidden(params, *row)[:, :6], hidden(params, *row[:3])[:, :6]) < NOISE


def test_a_token_sees_nothing_after_it(setup):
    model, params, hidden = setup
    row = _row((random_tokens((10,)), 0, 1, 0))
    before = hidden(params, *row[:3])
    later = row.copy()  # a NumPy array given to jax is not copied at once, so it must not change
    later[0, :, 6:10] = (row[0, :, 6:10] + 1) % 61
    after = hidden(params, *later[:3])
    assert np.array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:10] - after[:, 6:10]).max(axis=-1).min() > 1e-2


def test_only_differences_of_positions_matter(setup):
    """A rotary turns keys and queries together, so the same shift everywhere changes nothing but rounding."""
    model, params, hidden = setup
    tokens, positions, segments = _row((random_tokens((9,)), 0, 1, 0))[:3]
    want = hidden(params, tokens, positions, segments)[:, :9]
    assert relative(hidden(params, tokens, positions + 13, segments)[:, :9], want) < 3 * NOISE
    assert relative(hidden(params, tokens, 2 * positions, segments)[:, :9], want) > 1e-2


def test_padding_gives_finite_numbers_and_gradients_and_no_influence():
    model, params = random_model(num_hidden_layers=2)
    row = _row((random_tokens((5,)), 0, 1, 0))
    rows = np.concatenate([row, np.zeros_like(row)], axis=1)  # the second row is padding alone
    poisoned = rows.copy()
    poisoned[0][rows[2] == 0] = 44

    @jax.jit
    @jax.value_and_grad
    def total(params, rows, weight):
        return (model.hidden(params, *rows[:3]) * weight[..., None]).sum()

    value, gradient = total(params, rows, np.ones((2, WIDTH), np.float32))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    trained = (rows[2] != 0).astype(np.float32)
    (want, wanted), (got, gradient) = total(params, rows, trained), total(params, poisoned, trained)
    assert want == got
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(gradient), strict=True):
        assert relative(two, one) < NOISE


def test_remat_trades_products_for_memory_and_not_the_gradient():
    tokens = random_tokens((2, 12))

    def gradient(remat):
        model, params = random_model(model={"remat": remat}, num_hidden_layers=2)
        loss = lambda params: jnp.square(model.hidden(params, *whole_rows(tokens))).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    (want, none), (one, attention), (two, full) = (gradient(remat) for remat in ("none", "attention", "full"))
    assert none < attention < full
    for got in (one, two):
        assert max(jax.tree.leaves(jax.tree.map(relative, got, want))) < NOISE
