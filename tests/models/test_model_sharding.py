"""Eight devices give the numbers of one, and every array is cut as declared: shards' shapes are asserted."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from fast_set import slow_but
from model_cases import (
    DECODE,
    FAMILY_CASES,
    HIDDEN,
    PREFILL,
    VALUE_AND_GRADIENT,
    mean_logp,
    random_model,
    random_tokens,
    relative,
    whole_rows,
)

from grpo_jax.mesh import batch_sharding, make_mesh
from grpo_jax.models.model import Model

V, D, F, H, K, d, L, N, T = 64, 32, 48, 8, 4, 6, 2, 8, 10
FIELDS = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": d,
    "num_hidden_layers": L,
    "tie_word_embeddings": False,
}
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (2, 1, 4), "all": (2, 2, 2)}
NOISE = 1e-5


@pytest.fixture(scope="module")
def one():
    return random_model(**FIELDS)


@pytest.fixture(scope="module", params=slow_but(("fsdp", "all"), MESHES))
def eight(request, one):
    """The same parameters on eight devices, and the mesh's sizes."""
    sizes = MESHES[request.param]
    model = replace(one[0], mesh=make_mesh(*sizes))
    return model, jax.device_put(one[1], model.param_shardings), sizes


def _shards(x):
    (shape,) = {shard.data.shape for shard in x.addressable_shards}
    assert len(x.addressable_shards) == 8
    return shape


def _check_param_shards(params, sizes):
    _, f, t = sizes
    outer, layer = params["outer"], params["layers"]["0.0"]
    attention, mlp = layer["attention"], layer["mlp"]
    assert _shards(outer["embed"]["kernel"]) == _shards(outer["head"]["kernel"]) == (V // t, D // f)
    assert _shards(outer["norm"]["scale"]) == (D,) and _shards(layer["mlp_norm"]["scale"]) == (L, D)
    assert _shards(attention["q"]["kernel"]) == (L, H // t, d, D // f)
    assert _shards(attention["q"]["bias"]) == (L, H // t, d)
    assert _shards(attention["k"]["kernel"]) == _shards(attention["v"]["kernel"]) == (L, K // t, d, D // f)
    assert _shards(attention["out"]["kernel"]) == (L, D // f, H // t, d)
    assert _shards(mlp["gate"]["kernel"]) == _shards(mlp["up"]["kernel"]) == (L, F // t, D // f)
    assert _shards(mlp["down"]["kernel"]) == (L, D // f, F // t)


def test_parameters_are_cut_as_declared(eight):
    model, params, sizes = eight
    _check_param_shards(params, sizes)
    _check_param_shards(model.init(0), sizes)


def test_init_is_the_same_on_every_mesh(one, eight):
    jax.tree.map(np.testing.assert_array_equal, eight[0].init(5), one[0].init(5))


def test_hidden_states(one, eight):
    model, params, (data, fsdp, _) = eight
    rows = whole_rows(random_tokens((N, T), V))
    got = HIDDEN(model, params, *jax.device_put(rows, batch_sharding(model.mesh)))
    assert _shards(got) == (N // (data * fsdp), T, D)
    assert relative(got, HIDDEN(*one, *rows)) < NOISE


def test_gradients(one, eight):
    model, params, sizes = eight
    tokens = random_tokens((N, T), V)
    value, gradient = jax.jit(
        jax.value_and_grad(partial(mean_logp, model)), out_shardings=(None, model.param_shardings)
    )(params, jax.device_put(tokens, batch_sharding(model.mesh)))
    wanted, want = VALUE_AND_GRADIENT(*one, tokens)
    assert relative(value, wanted) < NOISE
    _check_param_shards(gradient, sizes)
    scale = max(np.abs(w).max() for w in jax.tree.leaves(want))
    for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(g) - np.asarray(w)).max() < NOISE * scale


def test_decoding(one, eight):
    model, params, (data, fsdp, tensor) = eight
    tokens, lengths = random_tokens((8, 6), V), np.array([6, 2, 3, 1, 5, 4, 4, 2], np.int32)

    def run(model, params):
        view = model.decode_view(params)
        hidden, prompt_cache = PREFILL(model, view, tokens, lengths)
        start = model.init_cache(16, 3)
        out, cache = [hidden], start
        for at in range(2):
            new = random_tokens((16,), V, seed=at)
            hidden, cache = DECODE(model, view, prompt_cache, lengths, cache, np.full(16, at, np.int32), new)
            out.append(model.head(view, hidden))
        return view, prompt_cache, start, out

    view, prompt_cache, cache, got = run(model, params)
    layer, rows = view.layers[0], data * fsdp
    assert _shards(view.outer["embed"]["kernel"]) == (V // tensor, D)
    assert _shards(layer["attention"]["qkv"]["kernel"]) == (D, 1, K // tensor * (H // K + 2) * d)
    assert _shards(layer["mlp"]["gate_up"]["kernel"]) == (D, 1, 2 * F // tensor)
    assert _shards(prompt_cache[1][0][0]) == (8 // rows, K // tensor, d, 6)
    assert _shards(cache[1][1][0]) == (16 // rows, K // tensor, 3, d)
    for g, w in zip(got, run(*one)[3], strict=True):
        assert relative(g, w) < NOISE


@pytest.mark.parametrize(("family", "sizes"), [("olmo2", (1, 2, 4, 1)), ("qwen3_moe", (1, 2, 2, 2))])
def test_families(family, sizes):
    single, params = random_model(**FAMILY_CASES[family], num_hidden_layers=2)
    model = replace(single, mesh=make_mesh(*sizes))
    placed, tokens = jax.device_put(params, model.param_shardings), random_tokens((8, 6))
    if family == "qwen3_moe":
        experts = placed["layers"]["0.0"]["mlp"]["experts"]
        assert _shards(experts["gate"]) == _shards(experts["up"]) == (1, 2, 12, 16)
        assert _shards(experts["down"]) == (1, 2, 16, 12)
    value, gradient = VALUE_AND_GRADIENT(model, placed, tokens)
    wanted, want = VALUE_AND_GRADIENT(single, params, tokens)
    assert relative(value, wanted) < NOISE
    scale = max(np.abs(w).max() for w in jax.tree.leaves(want))
    for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(g) - np.asarray(w)).max() < NOISE * scale
    lengths = np.array([6, 2, 3, 1, 5, 4, 4, 2], np.int32)
    hidden = [PREFILL(m, m.decode_view(p), tokens, lengths)[0] for m, p in ((model, placed), (single, params))]
    assert relative(*hidden) < NOISE


def test_axes_that_do_not_divide_are_replicated():
    """Two key heads, three layers and a vocabulary of 61 on four tensor devices; nine rows on two data devices."""
    single, params = random_model(num_attention_heads=4, num_key_value_heads=2)
    model = Model(single.spec, mesh=make_mesh(2, 1, 4))
    placed = jax.device_put(params, model.param_shardings)
    assert _shards(placed["outer"]["embed"]["kernel"]) == (61, 32)
    assert _shards(placed["layers"]["0.0"]["attention"]["k"]["kernel"]) == (3, 2, 8, 32)
    assert _shards(placed["layers"]["0.0"]["attention"]["q"]["kernel"]) == (3, 1, 8, 32)
    tokens = random_tokens((9, 7))
    assert relative(model.logits(placed, tokens), single.logits(params, tokens)) < NOISE
    prompts, lengths = random_tokens((3, 4)), np.array([4, 2, 3], np.int32)
    hidden = [PREFILL(m, m.decode_view(p), prompts, lengths)[0] for m, p in ((model, placed), (single, params))]
    assert relative(*hidden) < NOISE
