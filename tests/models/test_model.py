"""The facade: a static value, declared weights, precision, depth, unequal layers, scale and cap of the logits."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from model_cases import HIDDEN, PREFILL, config, random_model, random_tokens, relative, whole_rows

from grpo_jax.models import Model, ModelSpec
from grpo_jax.models.rotary_spec import RotarySpec


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _programs(model, params):
    """name -> jaxpr of everything the loop calls."""
    tokens, lengths = random_tokens((4, 6)), np.array([2, 3], np.int32)
    view = model.decode_view(params)
    prompt_cache = jax.eval_shape(model.prefill, view, tokens[:2], lengths)[1]
    state = (lengths, model.init_cache(4, 3), np.zeros(4, np.int32), tokens[:, 0])
    loss = lambda p: model.hidden(p, *whole_rows(tokens)).astype(jnp.float32).sum()  # noqa: E731
    return {
        "hidden": jax.make_jaxpr(jax.grad(loss))(params),
        "prefill": jax.make_jaxpr(model.prefill)(view, tokens[:2], lengths),
        "decode": jax.make_jaxpr(model.decode)(view, prompt_cache, *state),
        "head": jax.make_jaxpr(model.head)(view, jnp.zeros((4, 32), model.dtype)),
    }


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, jax.lax.Precision.HIGHEST),
        ({"dtype": "bfloat16"}, jax.lax.Precision.DEFAULT),
        ({"precision": "high"}, jax.lax.Precision.HIGH),
    ],
)
def test_every_matmul_names_its_precision(fields, want):
    model, params = random_model(model=fields)
    for name, program in _programs(model, params).items():
        products = [e for e in _equations(program.jaxpr) if e.primitive.name == "dot_general"]
        assert products, name
        assert {e.params["precision"] for e in products} == {(want, want)}, name


def test_the_training_program_does_not_grow_with_depth():
    def size(depth):
        model, params = random_model(num_hidden_layers=depth)
        program = jax.make_jaxpr(lambda p: model.hidden(p, *whole_rows(random_tokens((2, 6)))))(params)
        return len(list(_equations(program.jaxpr)))

    assert size(2) == size(11) < 200


def test_unequal_layers_run_in_order():
    """Layers of two rotary bases and two widths: the scanned runs equal the unrolled decoding."""
    model, _ = random_model(num_hidden_layers=5)
    one = model.spec.layers[0]
    two = replace(one, rotary=RotarySpec("default", 100.0), ffn=24)
    spec = replace(model.spec, layers=(one, two, one, two, two))
    model = Model(spec)
    assert [len(run.pattern) for run in spec.runs] == [2, 1]
    params = model.scale_matrices(model.init(3), 10.0)
    tokens = random_tokens((2, 9))
    view = model.decode_view(params)
    hidden, _ = PREFILL(model, view, tokens, np.array([9, 9], np.int32))
    full = model.logits(params, tokens)
    assert relative(model.head(view, hidden), full[:, -1]) < 1e-5
    swapped = Model(replace(spec, layers=(two, one, two, one, one)))
    moved = {"outer": params["outer"], "layers": {}}
    for name, source in (("0.0", "0.1"), ("0.1", "0.0")):
        moved["layers"][name] = params["layers"][source]
    moved["layers"]["1.0"] = jax.tree.map(lambda x: x[:1], params["layers"]["0.0"])
    assert relative(swapped.logits(moved, tokens), full) > 1e-3


def test_a_model_is_a_static_value():
    spec = ModelSpec.from_hf(config())
    one, same = Model(spec), Model(ModelSpec.from_hf(config(eos_token_id=4)), "float32", precision="highest")
    assert one == same and hash(one) == hash(same)
    assert one != Model(spec, dtype="bfloat16") and Model(spec, dtype="bfloat16").precision == "default"
    with pytest.raises(FrozenInstanceError):
        one.dtype = "bfloat16"
    tokens = random_tokens((2, 5))
    assert np.array_equal(one.logits(one.init(0), tokens), same.logits(same.init(0), tokens))


def test_init_is_as_documented():
    model = Model(ModelSpec.from_hf(config(hidden_size=64, vocab_size=500)))
    params = model.init(0)
    assert model.param_count == sum(x.size for x in jax.tree.leaves(params))
    for value, matrix in zip(jax.tree.leaves(params), jax.tree.leaves(model.decay_mask), strict=True):
        if matrix:
            assert abs(float(value.mean())) < 2e-3 and 0.019 < float(value.std()) < 0.021
        else:
            assert len(np.unique(value)) == 1 and float(value.ravel()[0]) in (0.0, 1.0)
    assert not np.array_equal(params["outer"]["embed"]["kernel"], model.init(1)["outer"]["embed"]["kernel"])
    layers = params["layers"]["0.0"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


def test_abstract_params_describe_the_parameters():
    model, params = random_model(model={"param_dtype": "bfloat16"})
    same = lambda a, x: (a.shape, a.dtype, a.sharding) == (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, model.abstract_params, params)))


def test_unembedding_is_the_tensor_itself():
    for tied, name in ((True, "embed"), (False, "head")):
        model, params = random_model(tie_word_embeddings=tied)
        assert ("head" in params["outer"]) is not tied
        assert np.array_equal(model.unembedding(params), params["outer"][name]["kernel"])
        program = jax.make_jaxpr(model.unembedding)(params)
        assert {e.primitive.name for e in _equations(program.jaxpr)} <= {"sharding_constraint"}


def test_logits_are_scaled_then_capped():
    model, params = random_model()
    tokens = random_tokens((2, 6))
    plain = np.asarray(model.logits(params, tokens))
    other = Model(replace(model.spec, softcap=3.0, logit_scale=0.5))
    want = 3.0 * np.tanh(0.5 * plain / 3.0)
    assert relative(other.logits(params, tokens), want) < 1e-5
    hidden = HIDDEN(other, params, *whole_rows(tokens))
    assert relative(other.head(other.decode_view(params), hidden), want) < 1e-5
    assert (model.softcap, model.logit_scale, other.softcap, other.logit_scale) == (None, 1.0, 3.0, 0.5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    model, params = random_model(model={"dtype": "bfloat16"})
    tokens = random_tokens((2, 8))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = jax.eval_shape(model.hidden, params, *whole_rows(tokens))
    assert hidden.dtype == model.unembedding(params).dtype == jnp.bfloat16
    got, exact = model.logits(params, tokens), Model(model.spec).logits(params, tokens)
    assert got.dtype == jnp.float32 and 1e-4 < relative(got, exact) < 0.05


def test_gradients_of_bfloat16_are_summed_over_tokens_in_float32():
    """2,048 equal tokens give equal contributions: summed in bfloat16 they would stop growing after 256."""
    exact, params = random_model(num_hidden_layers=1)
    tokens = np.full((8, 256), 7, np.int32)
    weight = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    gradients = []
    for model in (exact, replace(exact, dtype="bfloat16", precision=None)):
        loss = lambda p, m=model: (m.hidden(p, *whole_rows(tokens)).astype(jnp.float32) * weight).sum()  # noqa: E731
        gradients.append(jax.jit(jax.grad(loss))(params))
    want, got = gradients
    assert relative(got["outer"]["embed"]["kernel"], want["outer"]["embed"]["kernel"]) < 0.02
    v = lambda tree: tree["layers"]["0.0"]["attention"]["v"]["bias"]  # noqa: E731
    assert relative(v(got), v(want)) < 0.02
    assert relative(got["outer"]["norm"]["scale"], want["outer"]["norm"]["scale"]) < 0.02


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float16"}, ["dtype", "'float16'", "float32, bfloat16"]),
        ({"param_dtype": "int8"}, ["param_dtype", "'int8'"]),
        ({"precision": "tf32"}, ["precision", "'tf32'", "highest"]),
        ({"remat": "some"}, ["remat", "'some'", "none, full, attention"]),
    ],
)
def test_illegal_names(fields, words):
    with pytest.raises(ValueError) as caught:
        Model(ModelSpec.from_hf(config()), **fields)
    assert all(word in str(caught.value) for word in words)
