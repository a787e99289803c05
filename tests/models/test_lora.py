"""Adapters: off at the start, the same on the fly and merged, gradients, sharding, and what leaves the program."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import FAMILY_CASES, PREFILL, by_hf_name, config, mean_logp, random_model, random_tokens, relative
from safetensors.numpy import load_file

from grpo_jax.mesh import make_mesh
from grpo_jax.models import LoraSpec, Model, ModelSpec, load_model, save_hf, save_peft
from grpo_jax.testing import tiny_checkpoint

LORA = LoraSpec(3, 6.0)
CASES = {
    "every linear map": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, LORA),
    "queries and values of unlike layers": (
        {"model_type": "smollm3", "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4},
        LoraSpec(2, 1.0, ("q", "v")),
    ),
    "attention beside experts": (FAMILY_CASES["qwen3_moe"], LoraSpec(2, 3.0, ("q", "k", "v", "out"))),
}
DENSE = jax.jit(jax.grad(mean_logp, argnums=1), static_argnums=0)


def _adapted(base, lora, seed=5):
    """The model with adapters, and adapters that are not off."""
    model = replace(base, lora=lora)
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.device_put(0.3 * rng.standard_normal(x.shape).astype(np.float32), x.sharding)  # noqa: E731
    return model, jax.tree.map(draw, model.init_adapters(seed))


@pytest.fixture(scope="module", params=CASES)
def setup(request):
    fields, lora = CASES[request.param]
    base, frozen = random_model(**fields, num_hidden_layers=3)
    return base, frozen, *_adapted(base, lora)


def _named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_the_tree_is_cut_and_joined(setup):
    base, frozen, model, adapters = setup
    params = model.joined(adapters, frozen)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(model.trained(params), adapters)
    same(model.frozen(params), frozen)
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params)
    assert len(_named(adapters)) + len(_named(frozen)) == len(_named(params))
    assert {path.rsplit("[")[-1] for path in _named(adapters)} == {"'lora_a']", "'lora_b']"}
    assert base.trained(frozen) is base.joined(frozen, None) is frozen and base.frozen(frozen) is None
    assert all(jax.tree.leaves(model.trained(model.decay_mask)))


def test_new_adapters_change_nothing(setup):
    base, frozen, model, _ = setup
    new = model.init_adapters(0)
    for path, leaf in _named(new).items():
        bound = 1 / np.sqrt(np.prod(leaf.shape[2:]))
        assert (not leaf.any()) if "lora_b" in path else 0.5 * bound < np.abs(leaf).max() <= bound
    tokens = random_tokens((2, 9))
    assert relative(model.logits(model.joined(new, frozen), tokens), base.logits(frozen, tokens)) < 1e-5


def test_on_the_fly_is_merged(setup):
    base, frozen, model, adapters = setup
    params, tokens = model.joined(adapters, frozen), random_tokens((2, 9))
    merged = model.merged(params)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    want = base.logits(merged, tokens)
    assert relative(model.logits(params, tokens), want) < 1e-5
    assert relative(base.logits(frozen, tokens), want) > 1e-2
    view, lengths = model.decode_view(params), np.array([9, 4], np.int32)
    assert jax.tree.structure(view) == jax.tree.structure(base.decode_view(frozen))
    hidden, _ = PREFILL(model, view, tokens, lengths)
    assert relative(model.head(view, hidden), want[np.arange(2), lengths - 1]) < 1e-5


def test_the_gradient_is_the_projection_of_the_dense_one(setup):
    base, frozen, model, adapters = setup
    params, tokens = model.joined(adapters, frozen), random_tokens((2, 9))
    loss = lambda adapters, frozen: mean_logp(model, model.joined(adapters, frozen), tokens)  # noqa: E731
    got = _named(jax.jit(jax.grad(loss))(adapters, frozen))
    dense, named = _named(DENSE(base, model.merged(params), tokens)), _named(adapters)
    scale = max(np.abs(g).max() for g in got.values())
    assert set(got) == set(named)
    for path in (path for path in got if "lora_a" in path):
        other = path.replace("lora_a", "lora_b")
        a, b = (np.asarray(named[p], np.float64) for p in (path, other))
        whole = np.asarray(dense[path.replace("lora_a", "kernel")], np.float64)
        layers, rank, fan_out = len(a), a.shape[1], b[0, ..., 0].size
        a, b, whole = a.reshape(layers, rank, -1), b.reshape(layers, fan_out, rank), whole.reshape(layers, fan_out, -1)
        for name, want in ((path, np.einsum("lor,loi->lri", b, whole)), (other, np.einsum("loi,lri->lor", whole, a))):
            want = model.lora.scale * want.reshape(got[name].shape)
            assert np.abs(got[name] - want).max() < 2e-5 * scale, name


def test_a_bfloat16_base_has_float32_adapters():
    model = Model(ModelSpec.from_hf(config()), dtype="bfloat16", param_dtype="bfloat16", lora=LORA)
    params = model.init(0)
    assert {x.dtype for x in jax.tree.leaves(model.frozen(params))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(model.trained(params))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(model.decode_view(params))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(model.merged(params))} == {jnp.dtype("bfloat16")}


def test_eight_devices():
    base, frozen = random_model(num_attention_heads=8, num_key_value_heads=4, head_dim=6, num_hidden_layers=2)
    single, adapters = _adapted(base, LORA)
    model = replace(single, mesh=make_mesh(2, 2, 2))
    params = single.joined(adapters, frozen)
    placed = jax.device_put(params, model.param_shardings)
    q, down = placed["layers"]["0.0"]["attention"]["q"], placed["layers"]["0.0"]["mlp"]["down"]
    shape = lambda x: {shard.data.shape for shard in x.addressable_shards}  # noqa: E731
    assert shape(q["lora_a"]) == {(2, 3, 16)} and shape(q["lora_b"]) == {(2, 4, 6, 3)}
    assert shape(down["lora_a"]) == {(2, 3, 20)} and shape(down["lora_b"]) == {(2, 16, 3)}
    tokens = random_tokens((8, 7))
    want = single.logits(params, tokens)
    assert relative(model.logits(placed, tokens), want) < 1e-5
    assert relative(model.base.logits(model.merged(placed), tokens), want) < 1e-5


def test_a_saved_model_has_them_merged(tmp_path):
    source = tiny_checkpoint(tmp_path / "in")
    base, frozen = load_model(source)
    model, adapters = _adapted(base, LORA)
    params = model.joined(adapters, frozen)
    save_hf(model, params, tmp_path / "out", source=source)
    again, loaded = load_model(tmp_path / "out")
    assert again == base
    jax.tree.map(np.testing.assert_array_equal, loaded, model.merged(params))


def test_what_is_saved_for_peft_is_what_is_merged(tmp_path):
    """Under each tensor's name two matrices, whose product, scaled, is what merging adds to it."""
    base, frozen = random_model(num_hidden_layers=2)
    model, adapters = _adapted(base, LoraSpec(3, 5.0, ("q", "v", "out", "down")))
    save_peft(model, adapters, tmp_path, base="x")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (3, 5.0, "x")
    assert said["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    saved, before = load_file(tmp_path / "adapter_model.safetensors"), by_hf_name(base, frozen)
    merged = by_hf_name(base, model.merged(model.joined(adapters, frozen)))
    changed = {name.removesuffix(".weight") for name in merged if not np.array_equal(merged[name], before[name])}
    assert len(changed) == 8
    assert saved.keys() == {f"base_model.model.{name}.lora_{x}.weight" for name in changed for x in "AB"}
    for name in changed:
        a, b = (saved[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        want = before[f"{name}.weight"] + 5.0 / 3 * b @ a
        assert a.dtype == b.dtype == np.float32 and relative(merged[f"{name}.weight"], want) < 1e-5


@pytest.mark.slow
@pytest.mark.torch
def test_peft_loads_what_is_saved(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base, frozen = load_model(tiny_checkpoint(tmp_path / "in"))
    model, adapters = _adapted(base, LoraSpec(3, 5.0, ("q", "v", "out", "up", "down")))
    save_peft(model, adapters, tmp_path / "adapters", base=str(tmp_path / "in"))
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["r"] == 3
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in"), tmp_path / "adapters"
    )
    tokens = random_tokens((2, 9))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert relative(model.logits(model.joined(adapters, frozen), tokens), want) < 2e-5
    assert relative(base.logits(frozen, tokens), want) > 1e-2


REFUSED = {
    "rank": (lambda: LoraSpec(0, 1.0), "model.lora.rank: got 0"),
    "alpha": (lambda: LoraSpec(1, 0.0), r"model.lora.alpha: got 0\.0"),
    "target": (lambda: LoraSpec(1, 1.0, ("q", "o_proj")), "model.lora.targets: got .*o_proj"),
    "no target": (lambda: LoraSpec(1, 1.0, ()), "model.lora.targets"),
    "experts": (lambda: Model(ModelSpec.from_hf(config(**FAMILY_CASES["qwen3_moe"])), lora=LORA), "experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        make()


def test_peft_has_no_place_for_joined_maps(tmp_path):
    base = Model(ModelSpec.from_hf(config(**FAMILY_CASES["phi3"])), lora=LoraSpec(1, 1.0, ("q",)))
    with pytest.raises(ValueError, match="phi3 holds in one tensor"):
        save_peft(base, base.init_adapters(0), tmp_path, base="x")
    with pytest.raises(ValueError, match="without adapters"):
        save_peft(base.base, {}, tmp_path, base="x")
