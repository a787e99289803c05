"""The log-prob head: chunked equals naive, forward and gradient, whatever the chunks, layouts, scales and sharding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.algo.logprobs import CHUNK_FLOATS, chunk_sizes, logprobs_and_entropy

M, D, V = 13, 7, 101
CHUNKS = [(None, None), (5, None), (None, 17), (4, 30), (13, 100), (1, 1), (12, 101), (1000, 1000)]
SCALES = [dict(), dict(temperature=0.7, softcap=2.0, logit_scale=0.3), dict(temperature=1.7), dict(softcap=1.0)]


def inputs(dtype=np.float32, spread=1.0):
    rng = np.random.default_rng(0)
    hidden = (spread * rng.normal(size=(M, D))).astype(dtype)
    unembed = rng.normal(size=(D, V)).astype(dtype)
    cotangents = rng.normal(size=(2, M)).astype(jnp.promote_types(dtype, jnp.float32))
    return hidden, unembed, rng.integers(0, V, M), cotangents


def naive(hidden, unembed, targets, temperature=1.0, softcap=None, logit_scale=1.0):
    """All logits, by log_softmax and gather."""
    logits = hidden @ unembed * logit_scale
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logps = jax.nn.log_softmax(logits / temperature)
    return logps[jnp.arange(len(targets)), targets], -jnp.sum(jnp.exp(logps) * logps, axis=-1)


def results(function, hidden, unembed, targets, cotangents, **options):
    """(logp, entropy, gradient of hidden, of unembed) of a weighted sum of logp and entropy."""
    return _results(function, tuple(options.items()), hidden, unembed, targets, cotangents)


@partial(jax.jit, static_argnums=(0, 1))
def _results(function, options, hidden, unembed, targets, cotangents):
    out, pull = jax.vjp(lambda h, w: function(h, w, targets, **dict(options)), hidden, unembed)
    return (*out, *pull(tuple(cotangents)))


CASES = [
    pytest.param(chunks, scales, marks=[] if chunks == (4, 30) or scales == SCALES[1] else pytest.mark.slow)
    for scales in SCALES
    for chunks in CHUNKS
]


@pytest.mark.parametrize(("chunks", "scales"), CASES, ids=str)
def test_chunks_equal_the_naive_form(chunks, scales):
    with jax.enable_x64(True):
        arguments = inputs(np.float64)
        expected = results(naive, *arguments, **scales)
        got = results(logprobs_and_entropy, *arguments, token_chunk=chunks[0], vocab_chunk=chunks[1], **scales)
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [(5, None), (4, 30), (1000, 1000)], ids=str)
def test_a_tied_embedding_as_it_lies(chunks):
    hidden, unembed, targets, cotangents = inputs()
    sizes = dict(token_chunk=chunks[0], vocab_chunk=chunks[1])
    expected = results(logprobs_and_entropy, hidden, unembed, targets, cotangents, **sizes)
    table = np.ascontiguousarray(unembed.T)
    got = results(logprobs_and_entropy, hidden, table, targets, cotangents, transposed=True, **sizes)
    for x, y in zip(got[:3], expected[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got[3].T, expected[3], rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunks", [(5, None), (None, 17), (4, 30)], ids=str)
def test_float32_against_float64(chunks):
    hidden, unembed, targets, cotangents = inputs()
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in (hidden, unembed)]
        expected = results(naive, *wide, targets, cotangents.astype(np.float64))
    got = results(
        logprobs_and_entropy, hidden, unembed, targets, cotangents, token_chunk=chunks[0], vocab_chunk=chunks[1]
    )
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients():
    hidden, unembed, targets, cotangents = inputs(jnp.bfloat16)
    wide = hidden.astype(np.float32), unembed.astype(np.float32)
    expected = results(naive, *wide, targets, cotangents)
    got = results(logprobs_and_entropy, hidden, unembed, targets, cotangents, token_chunk=4, vocab_chunk=30)
    assert [x.dtype for x in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for x, y, tolerance in zip(got, expected, (1e-5, 1e-5, 3e-2, 3e-2), strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spread", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("chunks", [(1000, 1000), (4, 30)], ids=str)
def test_flat_and_certain_distributions(spread, chunks):
    hidden, unembed, targets, cotangents = inputs(spread=spread)
    got = results(
        logprobs_and_entropy, hidden, unembed, targets, cotangents, token_chunk=chunks[0], vocab_chunk=chunks[1]
    )
    assert all(np.isfinite(x).all() for x in got)
    assert (got[0] <= 0).all() and (got[1] >= -1e-6).all() and (got[1] <= np.log(V) + 1e-5).all()
    if spread == 0:
        np.testing.assert_allclose(got[0], -np.log(V), rtol=1e-6)
        np.testing.assert_allclose(got[1], np.log(V), rtol=1e-6)


@pytest.mark.parametrize("chunks", [(1000, 1000), (4, 30)], ids=str)
def test_without_entropy(chunks):
    hidden, unembed, targets, _ = inputs()
    sizes = dict(token_chunk=chunks[0], vocab_chunk=chunks[1])
    score = jax.jit(partial(logprobs_and_entropy, **sizes), static_argnames="with_entropy")
    with_it, entropy = score(hidden, unembed, targets)
    without, nothing = score(hidden, unembed, targets, with_entropy=False)
    assert nothing is None and entropy is not None
    np.testing.assert_array_equal(with_it, without)


def head(hidden, unembed, targets, options):
    logp, entropy = logprobs_and_entropy(hidden, unembed, targets, **options)
    return jnp.sum(logp * jnp.cos(jnp.arange(len(targets)))) + jnp.sum(entropy * jnp.sin(jnp.arange(len(targets))))


def test_memory_is_that_of_a_chunk():
    """The compiler's own count: below a quarter of one [M, V] array, where log_softmax and gather need several."""
    count, width, vocab = 256, 16, 20_000
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((count, width), (width, vocab))]
    shapes.append(jax.ShapeDtypeStruct((count,), jnp.int32))

    def temporary(options):
        gradient = jax.jit(jax.grad(lambda h, w, t: head(h, w, t, options), (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = count * vocab * 4
    assert temporary(dict(token_chunk=count, vocab_chunk=vocab)) > logits
    assert temporary(dict(vocab_chunk=997)) < logits / 4
    assert temporary(dict(token_chunk=17)) < logits / 4


def test_default_chunks():
    assert chunk_sizes(8, 4, 100) == (8, 100)
    for count, vocab in [(512, 152_000), (65_536, 152_000), (10, 10_000_000), (1_000_000, 300)]:
        tokens, entries = chunk_sizes(count, 896, vocab)
        assert 1 <= tokens <= count and 1 <= entries <= vocab and tokens * entries <= CHUNK_FLOATS
        assert tokens < count or entries < vocab
    assert chunk_sizes(512, 896, 152_000) == (512, 1792)
    assert chunk_sizes(512, 4, 1000, token_chunk=100) == (100, 1000)
    assert chunk_sizes(512, 4, 1000, token_chunk=100, vocab_chunk=64) == (100, 64)
    assert chunk_sizes(512, 4, 1000, vocab_chunk=64) == (512, 64)


def test_precision_reaches_every_matmul():
    hidden, unembed, targets, _ = inputs()
    for sizes in (dict(), dict(token_chunk=4, vocab_chunk=30)):
        options = dict(precision="highest", **sizes)
        text = jax.jit(jax.grad(lambda h, w: head(h, w, targets, options), (0, 1))).lower(hidden, unembed).as_text()  # noqa: B023
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) >= 3 and all("HIGHEST" in line for line in dots)


SIZES = dict(vocab_chunk=25), dict(token_chunk=8), dict(token_chunk=8, vocab_chunk=25)


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp"), (None, None)], ids=str)
@pytest.mark.parametrize("options", slow_but(SIZES[2:], SIZES), ids=str)
def test_sharded_equals_one_device(spec, options):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    rng = np.random.default_rng(1)
    hidden, unembed = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 8), (8, 96)))
    targets = jnp.asarray(rng.integers(0, 96, 32))
    gradient = jax.jit(jax.value_and_grad(lambda h, w, t: head(h, w, t, options), (0, 1)))
    expected = gradient(hidden, unembed, targets)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    got = gradient(put(hidden, "data", None), put(unembed, *spec), put(targets, "data"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), got, expected)
