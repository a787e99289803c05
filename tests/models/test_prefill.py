"""Long prompts go through the model some columns at a time: the same cache, in memory that does not grow as P * P."""

from functools import partial

import jax
import numpy as np
import pytest
from fast_set import slow_but
from model_cases import FAMILY_CASES, random_model, random_tokens

from grpo_jax.mesh import make_mesh
from grpo_jax.models.prefill import CHUNK, prefill
from grpo_jax.testing import tiny_model

LENGTHS = np.array([23, 1, 9, 16], np.int32)
WIDTH = 23
CASES = {"qwen2": {"model_type": "qwen2"}} | {name: FAMILY_CASES[name] for name in ("gemma2", "gemma3", "qwen3_moe")}


def run(model, params, tokens, lengths, chunk):
    filled = jax.jit(partial(prefill, model.layout, chunk=chunk))
    hidden, cache = filled(model.decode_view(params), tokens, lengths)
    kept = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.asarray(hidden), [np.asarray(x)[kept.nonzero()[0], :, kept.nonzero()[1]] for kv in cache for x in kv]


@pytest.mark.parametrize("case", slow_but(("gemma2", "qwen3_moe"), CASES))
def test_chunks_change_nothing_but_rounding(case):
    """Chunks that divide the width and chunks that do not, shorter than a window and longer."""
    model, params = random_model(**CASES[case])
    tokens = random_tokens((len(LENGTHS), WIDTH))
    whole = run(model, params, tokens, LENGTHS, WIDTH)
    for chunk in (3, 8):
        parts = run(model, params, tokens, LENGTHS, chunk)
        for got, want in zip([parts[0], *parts[1]], [whole[0], *whole[1]], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_short_prompts_in_a_wide_batch_end_early():
    """Chunks behind the longest prompt are not computed: what is there is left as it was made, zeros."""
    model, params = random_model(model_type="qwen2")
    tokens, lengths = random_tokens((2, 32)), np.array([5, 7], np.int32)
    filled = jax.jit(partial(prefill, model.layout, chunk=8))
    _, cache = filled(model.decode_view(params), tokens, lengths)
    keys = np.asarray(cache[-1][0])
    assert np.abs(keys[:, :, :7]).min() > 0 and not keys[:, :, 8:].any()


def test_eight_devices_fill_what_one_does():
    tokens = random_tokens((4, WIDTH))
    one, params = tiny_model()
    want = run(one, params, tokens, LENGTHS, 8)
    spread, spread_params = tiny_model(make_mesh(2, 2, 2))
    got = run(spread, spread_params, tokens, LENGTHS, 8)
    for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_memory_of_a_long_prompt_is_bounded():
    """By the compiler's own account, for 8,192 columns; whole, scores alone are half of H * P * P and more."""
    model, params = tiny_model(hidden_size=64, head_dim=16, num_hidden_layers=1)
    view = jax.eval_shape(model.decode_view, params)
    heads, width = 4, 8 * CHUNK

    def temporary(chunk: int) -> int:
        tokens, lengths = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, width), (1,)))
        lowered = jax.jit(partial(prefill, model.layout, chunk=chunk)).lower(view, tokens, lengths)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    scores, kept = 4 * heads * width * width, 8 * 2 * 16 * width
    assert temporary(width) > scores / 2
    assert temporary(CHUNK) < 4 * (4 * heads * CHUNK * CHUNK) + 2 * kept < scores / 8
