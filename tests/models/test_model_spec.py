"""config.json to facts: both spellings, defaults, every refusal by its name, and the cutting into runs."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_cases import FAMILY_CASES, LLAMA3, config, random_model, random_tokens

from grpo_jax.models import Model, ModelSpec
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.rotary_spec import RotarySpec
from grpo_jax.models.spec import cut_runs


def test_every_fact_is_read():
    spec = ModelSpec.from_hf(
        config(
            "llama",
            num_key_value_heads=1,
            head_dim=10,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rms_norm_eps=1e-3,
            rope_parameters=LLAMA3 | {"rope_theta": 500.0},
            dtype="bfloat16",
            eos_token_id=[7, 3],
        )
    )
    layer = spec.layers[0]
    assert (spec.family, spec.vocab, spec.width, len(spec.layers), spec.max_len) == ("llama", 61, 32, 3, 128)
    assert (spec.tied, spec.norm_eps, spec.dtype, spec.stop_ids) == (False, 1e-3, "bfloat16", (3, 7))
    assert (layer.width, layer.heads, layer.kv_heads, layer.head_dim, layer.ffn) == (32, 4, 1, 10, 40)
    assert (layer.qkv_bias, layer.out_bias, layer.mlp_bias, layer.norm_eps) == (True, True, True, 1e-3)
    assert layer.rotary == RotarySpec("llama3", 500.0, 8.0, 1.0, 4.0, 16)


def test_absent_fields_have_the_defaults_of_the_family():
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {name: config()[name] for name in (*needed, "model_type", "max_position_embeddings")}
    llama = ModelSpec.from_hf(bare | {"model_type": "llama"})
    with pytest.raises(ValueError, match="num_key_value_heads: got 32"):  # what transformers would take
        ModelSpec.from_hf(bare)
    qwen2 = ModelSpec.from_hf(bare | {"num_key_value_heads": 4})
    for spec in (qwen2, llama):
        assert (spec.tied, spec.norm_eps, spec.stop_ids, spec.dtype) == (False, 1e-6, (), None)
        assert (spec.layers[0].kv_heads, spec.layers[0].head_dim) == (4, 8)
        assert spec.layers[0].rotary == RotarySpec("default", 10_000.0)
    biases = lambda spec: (spec.layers[0].qkv_bias, spec.layers[0].out_bias, spec.layers[0].mlp_bias)  # noqa: E731
    assert biases(qwen2) == (True, False, False)
    assert biases(llama) == (False, False, False)


def test_older_and_newer_spelling_say_the_same():
    newer = config("llama", rope_parameters=LLAMA3 | {"rope_theta": 500.0}, dtype="float16")
    older = {name: value for name, value in newer.items() if name not in ("rope_parameters", "dtype")}
    older |= {"rope_theta": 500.0, "rope_scaling": LLAMA3, "torch_dtype": "float16"}
    oldest = older | {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}}
    assert ModelSpec.from_hf(newer) == ModelSpec.from_hf(older) == ModelSpec.from_hf(oldest)
    assert ModelSpec.from_hf(older).dtype == ModelSpec.from_hf(newer).dtype == "float16"
    assert ModelSpec.from_hf(older | {"rope_theta": 501.0}) != ModelSpec.from_hf(older)


def test_a_null_rope_scaling_is_the_default_rotary():
    read = ModelSpec.from_hf(config(rope_parameters=None, rope_scaling=None, rope_theta=123.0))
    assert read.layers[0].rotary == RotarySpec("default", 123.0)


REFUSED = {
    "another family": ("gpt2", {}, ["'gpt2'", ", ".join(sorted(FAMILIES))]),
    "no family": (None, {}, ["None", ", ".join(sorted(FAMILIES))]),
    "activation": ("qwen2", {"hidden_act": "tanh"}, ["hidden_act", "'tanh'", "silu, "]),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "window by layer types without its flag": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8},
        ["use_sliding_window"],
    ),
    "window of no size": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 2},
        ["sliding_window", "0"],
    ),
    "kind of layer": ("qwen2", {"layer_types": ["linear_attention"] * 3}, ["layer_types", "'linear_attention'"]),
    "layer types of another depth": ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
    "rotary kind": (
        "llama",
        {"rope_scaling": {"type": "mrope", "factor": 2.0}},
        ["rope_scaling.rope_type", "'mrope'", "default, linear, dynamic, llama3, yarn, longrope"],
    ),
    "rotary by layer type": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["layer type"],
    ),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "llama3 without a factor": ("llama", {"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling.factor"]),
    "llama3 without a band": (
        "llama",
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        ["high_freq_factor", "low_freq_factor"],
    ),
    "theta": ("llama", {"rope_parameters": {"rope_theta": -1.0}}, ["rope_theta", "-1.0"]),
    "missing size": ("llama", {"hidden_size": None}, ["hidden_size", "None"]),
    "size as text": ("llama", {"vocab_size": "61"}, ["vocab_size", "'61'"]),
    "head_dim that does not divide": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 6}, ["head_dim"]),
    "odd head_dim": ("llama", {"head_dim": 7}, ["head_dim", "7"]),
    "key heads": ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
    "bias": ("llama", {"attention_bias": "yes"}, ["attention_bias", "'yes'"]),
    "eps": ("llama", {"rms_norm_eps": 0}, ["rms_norm_eps", "0"]),
    "dtype": ("llama", {"dtype": "float8"}, ["dtype", "'float8'"]),
    "absurd depth": ("llama", {"num_hidden_layers": 10**12}, ["num_hidden_layers", "1000000000000"]),
    "absurd experts": ("mixtral", {"num_local_experts": 10**12}, ["num_local_experts", "1000000000000"]),
    "more experts a token than there are": (
        "mixtral",
        {"num_local_experts": 2, "num_experts_per_tok": 3},
        ["num_experts_per_tok", "3", "2 experts"],
    ),
    "two numbers of experts": (
        "mixtral",
        {"num_local_experts": 2, "num_experts": 3},
        ["num_local_experts", "num_experts"],
    ),
    "attention to all, in a family that has no field for it": ("llama", {"is_causal": False}, ["is_causal", "False"]),
    "no word on what attention sees": ("qwen3", {"is_causal": None}, ["is_causal", "None"]),
    "windows from no layer on": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": None},
        ["max_window_layers", "None"],
    ),
    "mistral's windows without a size": (
        "mistral",
        {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
        ["sliding_window", "None"],
    ),
    "size of thirty digits": ("llama", {"vocab_size": 10**30}, ["vocab_size", "above 2147483647"]),
    "attention to what follows": ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    "one rotary for gemma3": ("gemma3_text", {}, ["rope_parameters", "sliding_attention"]),
    "longrope without its factors": (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
        ["rope_scaling.long_factor", "None"],
    ),
    "longrope of another width": (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 4}},
        ["rope_scaling.short_factor", "4 numbers"],
    ),
    "rotary kind of phi3": (
        "phi3",
        {"rope_scaling": {"type": "llama3"}},
        ["rope_scaling.rope_type", "default, longrope"],
    ),
    "rotary of some layers": ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers", "3 layers"]),
    "cap": ("gemma2", {"attn_logit_softcapping": -1.0}, ["attn_logit_softcapping", "-1.0"]),
    "stop ids": ("llama", {"eos_token_id": "</s>"}, ["eos_token_id", "'</s>'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_field(case):
    model_type, fields, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        ModelSpec.from_hf(config(model_type, **fields))
    for word in words:
        assert word in str(caught.value)


def test_a_window_that_is_not_in_use_is_fine():
    spec = ModelSpec.from_hf(config(use_sliding_window=False, sliding_window=8, max_window_layers=0))
    assert spec == ModelSpec.from_hf(config())
    assert ModelSpec.from_hf(config(use_sliding_window=True, sliding_window=8, max_window_layers=3)) == spec


def test_windows_are_read_by_layer():
    by_depth = ModelSpec.from_hf(config(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    assert [layer.window for layer in by_depth.layers] == [None, 8, 8]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    by_type = ModelSpec.from_hf(config(use_sliding_window=True, sliding_window=8, layer_types=types))
    assert [layer.window for layer in by_type.layers] == [8, None, 8]
    assert ModelSpec.from_hf(config(use_sliding_window=True, max_window_layers=0)).layers[0].window == 4096


def test_mistral_with_layer_types_has_the_windows_of_each():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    spec = ModelSpec.from_hf(config("mistral", sliding_window=8, layer_types=types))
    assert [layer.window for layer in spec.layers] == [8, None, 8]
    assert ModelSpec.from_hf(config(max_window_layers=None)) == ModelSpec.from_hf(config())


DEEP = json.loads("[" * 900 + "]" * 900)
ODD = [None, True, "x", [], [[1]], {}, {"full_attention": 5}, {"rope_type": ["x"]}, 10**30, -(10**30), 10**400, 0, 0.5]
ODD += [1e308, DEEP, {"rope_type": "longrope", "short_factor": [[1]]}]
OLDER = ("rope_scaling", "rope_theta", "partial_rotary_factor", "layer_types", "no_rope_layers", "mlp_only_layers")


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_field_holds_is_read_or_refused_by_name(family):
    windows = {"use_sliding_window": True, "sliding_window": 4}
    base = config(**next((c for c in FAMILY_CASES.values() if c["model_type"] == family), {"model_type": family}))
    names = {*base, *windows, *OLDER, *FAMILIES[family].defaults, "original_max_position_embeddings"}
    for name in names - {"model_type"}:
        for value in ODD:
            try:
                ModelSpec.from_hf(base | windows | {name: value})
            except ValueError as error:
                assert len(str(error)) < 400 and "\n" not in str(error)


def test_older_spellings_of_other_families():
    phi = config("phi3", rope_parameters=None, original_max_position_embeddings=16)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for name in ("su", "yarn", "longrope"):  # what Phi-3's first checkpoints called it
        rotary = ModelSpec.from_hf(phi | {"rope_scaling": {"type": name, **factors}}).layers[0].rotary
        assert rotary.kind == "longrope" and rotary.original_len == 16 and rotary.long_factors == (2.0,) * 4
    old = {"rope_theta": 7e5, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    gemma = ModelSpec.from_hf(config("gemma3_text", rope_parameters=None, sliding_window_pattern=3, **old))
    assert [layer.window for layer in gemma.layers] == [4096, 4096, None]
    assert gemma.layers[0].rotary == RotarySpec("default", 50.0)
    assert gemma.layers[2].rotary == RotarySpec("linear", 7e5, 8.0)


def test_a_text_too_long_for_its_frequencies_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
    fields = {"model_type": "llama", "max_position_embeddings": 8, "rope_parameters": rope}
    model, params = random_model(**fields, num_hidden_layers=1)
    model.logits(params, random_tokens((1, 8)))
    with pytest.raises(ValueError, match="rows of 9 tokens; the dynamic rotary has other frequencies .* than 8"):
        model.logits(params, random_tokens((1, 9)))
    told = Model(replace(model.spec, longest=12))
    assert told.logits(params, random_tokens((1, 12))).shape == (1, 12, 61)


def test_specs_are_values():
    one, same, other = (
        ModelSpec.from_hf(config(**f)) for f in ({}, {"eos_token_id": 5, "extra": 1}, {"vocab_size": 62})
    )
    assert one == same and hash(one) == hash(same)
    assert one != other
    assert json.loads(same.hf_config)["extra"] == 1


def test_every_family_names_each_tensor_once():
    for family in FAMILIES.values():
        names = [(key.name, key.part) for key in (*family.layer.values(), *family.outer.values())]
        assert len(set(names)) == len(names)
        assert all("{i}" in key.name for key in family.layer.values())


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=14))
def test_runs_cover_the_layers_in_order(kinds):
    base = ModelSpec.from_hf(config()).layers[0]
    layers = tuple(replace(base, ffn=40 if kind == "a" else 48) for kind in kinds)
    runs = cut_runs(layers)
    assert tuple(layer for run in runs for _ in range(run.repeats) for layer in run.pattern) == layers


@pytest.mark.parametrize(
    ("kinds", "shape"),
    [
        ("aaaa", [(1, 4)]),
        ("baaa", [(1, 1), (1, 3)]),
        ("aab" * 3 + "a", [(3, 3), (1, 1)]),
        ("ab" * 4, [(2, 4)]),
        ("a", [(1, 1)]),
    ],
)
def test_runs_are_few(kinds, shape):
    base = ModelSpec.from_hf(config()).layers[0]
    layers = tuple(replace(base, ffn=40 if kind == "a" else 48) for kind in kinds)
    assert [(len(run.pattern), run.repeats) for run in cut_runs(layers)] == shape
