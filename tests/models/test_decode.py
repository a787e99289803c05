"""Prefill and decoding equal the full forward pass at every position (contract 3), whatever the slot."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from model_cases import DECODE, FAMILY_CASES, LLAMA3, PREFILL, random_model, random_tokens

from grpo_jax.metrics import CompileLog
from grpo_jax.models import Model

LENGTHS = np.array([3, 1, 6], np.int32)
WIDTH, GROUP, STEPS = 8, 2, 7
CASES = {
    "qwen2": {"model_type": "qwen2"},
    "one key head": {"model_type": "qwen2", "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": False},
    "windows": {
        "model_type": "qwen3",
        "head_dim": 6,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "llama": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3 | {"rope_theta": 500.0},
    },
}


FAST = {"windows", "llama"}
"""Where the engine's tests do not pass, and every map that is joined has a bias."""


@pytest.fixture(scope="module", params=slow_but(FAST, CASES))
def setup(request):
    return random_model(**CASES[request.param])


def _logp(logits):
    return jax.nn.log_softmax(np.asarray(logits, np.float32))


def _texts(seed=1):
    """[Q, G, P + C] texts whose samples share their prompt."""
    texts = random_tokens((len(LENGTHS), GROUP, WIDTH + STEPS), seed=seed)
    for q, length in enumerate(LENGTHS):
        texts[q, :, :length] = texts[q, 0, :length]
    return texts


def _decode_all(model, params, texts, length=STEPS, steps=STEPS):
    """Log-probabilities [steps + 1, B, V]: after the prompt, and after each following token."""
    prompts = texts[:, 0, :WIDTH].copy()
    prompts[np.arange(WIDTH) >= LENGTHS[:, None]] = 60  # padding is a real token id: lengths decide
    view = model.decode_view(params)
    hidden, prompt_cache = PREFILL(model, view, prompts, LENGTHS)
    got = [np.repeat(_logp(model.head(view, hidden)), GROUP, axis=0)]
    cache = model.init_cache(len(LENGTHS) * GROUP, length)
    for i in range(steps):
        tokens = np.take_along_axis(texts, (LENGTHS + i)[:, None, None], axis=2).reshape(-1)
        cache_len = np.full(tokens.shape, i, np.int32)
        hidden, cache = DECODE(model, view, prompt_cache, LENGTHS, cache, cache_len, tokens)
        got.append(_logp(model.head(view, hidden)))
    return np.stack(got)


def _full(model, params, texts, steps=STEPS):
    rows = texts.reshape(-1, texts.shape[-1])
    logp = _logp(model.logits(params, rows))
    start = np.repeat(LENGTHS, GROUP) - 1
    return np.stack([logp[np.arange(len(rows)), start + i] for i in range(steps + 1)])


def test_every_position_equals_the_full_forward(setup):
    model, params = setup
    texts = _texts()
    difference = np.abs(_decode_all(model, params, texts) - _full(model, params, texts))
    assert difference.mean() < 1e-5 and difference.max() < 1e-4


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_every_position_of_each_family_equals_the_full_forward(family):
    """Across the edge of the windows, too: the texts are longer than they are."""
    depth = 2 if family in ("gemma2", "gemma3", "smollm3", "qwen3_moe") else 1  # two kinds of layers, or one
    model, params = random_model(**FAMILY_CASES[family], num_hidden_layers=depth)
    texts = _texts()
    difference = np.abs(_decode_all(model, params, texts) - _full(model, params, texts))
    assert difference.mean() < 1e-5 and difference.max() < 1e-4


def test_rows_at_different_lengths(setup):
    """Rows of one call need not be equally far: each has its own column and position."""
    model, params = setup
    texts = _texts()
    rows, ahead = texts.reshape(-1, texts.shape[-1]), np.array([0, 3, 1, 0, 4, 2], np.int32)
    view = model.decode_view(params)
    _, prompt_cache = PREFILL(model, view, texts[:, 0, :WIDTH], LENGTHS)
    cache, at = model.init_cache(len(rows), STEPS), np.zeros(len(rows), np.int32)
    start = np.repeat(LENGTHS, GROUP)
    want = _full(model, params, texts)
    for _ in range(6):
        hidden, cache = DECODE(model, view, prompt_cache, LENGTHS, cache, at, rows[np.arange(len(rows)), start + at])
        got = _logp(model.head(view, hidden))
        assert np.abs(got - want[at + 1, np.arange(len(rows))]).max() < 1e-4
        at = np.where(at < ahead, at + 1, at)  # a row that is done is written again at the same column
    assert (at == ahead).all()


def test_a_row_depends_on_neither_neighbours_nor_stale_columns(setup):
    model, params = setup
    texts, other = _texts(), _texts(seed=9)
    other[0, 0] = texts[0, 0]
    other[0, 1, : LENGTHS[0]] = texts[0, 0, : LENGTHS[0]]
    one, two = _decode_all(model, params, texts), _decode_all(model, params, other)
    assert np.array_equal(one[:, 0], two[:, 0])
    assert np.abs(one[:, 2:] - two[:, 2:]).max() > 1e-2
    view = model.decode_view(params)
    _, prompt_cache = PREFILL(model, view, texts[:, 0, :WIDTH], LENGTHS)
    clean = model.init_cache(6, STEPS)
    stale = jax.tree.map(lambda x: x + 3.0, clean)
    at, tokens = np.zeros(6, np.int32), np.arange(6, dtype=np.int32)
    outputs = [DECODE(model, view, prompt_cache, LENGTHS, cache, at, tokens)[0] for cache in (clean, stale)]
    assert np.array_equal(*outputs)


def test_the_length_of_the_cache_does_not_matter(setup):
    model, params = setup
    texts = _texts()
    exact, long = (_decode_all(model, params, texts, length) for length in (STEPS, 3 * STEPS))
    difference = np.abs(exact - long)  # other shapes, so other sums: up to 1.05e-5 was seen
    assert difference.mean() < 1e-6 and difference.max() < 2e-5


def test_a_full_row_is_left_alone(setup):
    """At a column beyond the buffer nothing is written, so a row that is done may go on being called."""
    model, params = setup
    view = model.decode_view(params)
    _, prompt_cache = PREFILL(model, view, _texts()[:, 0, :WIDTH], LENGTHS)
    cache = jax.tree.map(lambda x: x + 1.0, model.init_cache(6, STEPS))
    full, tokens = np.full(6, STEPS, np.int32), np.arange(6, dtype=np.int32)
    hidden, after = DECODE(model, view, prompt_cache, LENGTHS, cache, full, tokens)
    assert np.isfinite(hidden).all()
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_cache_and_view_are_in_the_compute_dtype():
    model, params = random_model(model={"dtype": "bfloat16"}, num_hidden_layers=1)
    view = model.decode_view(params)
    assert {x.dtype for x in jax.tree.leaves(view)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(model.init_cache(2, 3))} == {jnp.dtype("bfloat16")}
    texts = _texts()
    got = _decode_all(model, params, texts)
    exact = _full(replace(model, dtype="float32", precision=None), params, texts)
    assert got.dtype == np.float32
    assert np.abs(got - _full(model, params, texts)).mean() < 0.1
    assert 1e-4 < np.abs(got - exact).mean() < 0.1


def test_rows_that_are_no_multiple_of_the_prompts_are_refused(setup):
    model, params = setup
    view = model.decode_view(params)
    _, prompt_cache = PREFILL(model, view, _texts()[:, 0, :WIDTH], LENGTHS)
    with pytest.raises(ValueError, match="got 4 rows for 3 prompts"):
        model.decode(view, prompt_cache, LENGTHS, model.init_cache(4, 3), np.zeros(4, np.int32), np.arange(4))


def test_decoding_compiles_once():
    model, params = random_model(vocab_size=67, num_hidden_layers=1)  # a spec that no other test decodes
    again = Model(model.spec)
    view = model.decode_view(params)
    _, prompt_cache = PREFILL(model, view, _texts()[:, 0, :WIDTH], LENGTHS)
    cache = model.init_cache(6, 3)

    def decode(built, at):
        DECODE(built, view, prompt_cache, LENGTHS, cache, np.full(6, at, np.int32), np.arange(6))

    with CompileLog() as first:
        decode(model, 0)
    with CompileLog() as later:
        decode(again, 1)
        decode(model, 2)
    assert first.count > 0 and later.count == 0
