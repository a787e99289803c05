"""Against transformers and torch: logits, gradients, and a directory that goes out and back."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from model_cases import LLAMA3, by_hf_name, mean_logp, random_tokens, relative

from grpo_jax.models import load_model, save_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CASES = {
    "qwen2 grouped, tied": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 one key head, untied": ("Qwen2Config", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen2 head_dim apart": ("Qwen2Config", {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "qwen2 window not in use": (
        "Qwen2Config",
        {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "llama grouped, untied": ("LlamaConfig", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "llama 3 rotary, tied": (
        "LlamaConfig",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3 | {"rope_theta": 500.0},
        },
    ),
    "llama biases, head_dim apart": (
        "LlamaConfig",
        {"num_key_value_heads": 4, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen3 qk-norm, head_dim apart, biases": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True},
    ),
    "qwen3 windows": (
        "Qwen3Config",
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "llama theta": (
        "LlamaConfig",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 97.0}},
    ),
}


def _torch_model(case):
    name, fields = CASES[case]
    config = getattr(transformers, name)(**SHAPE, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return model


def _torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    reference, tokens = _torch_model(case), random_tokens((2, 40))
    reference.save_pretrained(tmp_path)
    model, params = load_model(tmp_path)
    assert model.spec.layers[0].head_dim == CASES[case][1].get("head_dim", 8)
    assert relative(model.logits(params, tokens), _torch_logits(reference, tokens)) < 2e-5


def test_logits_from_the_older_spelling(tmp_path):
    """rope_theta, rope_scaling and torch_dtype, as hub checkpoints have them."""
    reference, tokens = _torch_model("llama 3 rotary, tied"), random_tokens((2, 40))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, params = load_model(tmp_path)
    assert model.spec.dtype == "float32"
    assert relative(model.logits(params, tokens), _torch_logits(again, tokens)) < 2e-5
    assert relative(model.logits(params, tokens), _torch_logits(reference, tokens)) < 2e-5


@pytest.mark.parametrize("case", ["qwen2 grouped, tied", "llama biases, head_dim apart"])
def test_gradients_of_the_mean_logp(case, tmp_path):
    reference, tokens = _torch_model(case), random_tokens((2, 24))
    reference.save_pretrained(tmp_path)
    ids = torch.tensor(tokens, dtype=torch.long)
    logp = reference(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    logp.mean().backward()
    model, params = load_model(tmp_path)
    value, gradient = jax.jit(jax.value_and_grad(partial(mean_logp, model)))(params, tokens)
    assert abs(float(value) - logp.mean().item()) < 2e-5 * abs(float(value))
    got = by_hf_name(model, gradient)
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    assert set(got) == set(wanted)
    scale = max(np.abs(want).max() for want in wanted.values())
    for name, want in wanted.items():
        assert np.abs(got[name] - want).max() < 2e-5 * scale, name


@pytest.mark.parametrize("case", ["qwen2 grouped, tied", "llama grouped, untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_is_saved(case, dtype, tmp_path):
    reference, tokens = _torch_model(case), random_tokens((2, 16))
    reference.to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    model, params = load_model(tmp_path / "in")
    save_hf(model, params, tmp_path / "out", source=tmp_path / "in", shard_bytes=20_000)
    load = transformers.AutoModelForCausalLM.from_pretrained
    back, info = load(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.dtype == getattr(torch, dtype)
    theirs = dict(back.named_parameters())
    for name, value in reference.named_parameters():
        assert torch.equal(value, theirs[name]), name
    before, after = load(tmp_path / "in", dtype=torch.float32), load(tmp_path / "out", dtype=torch.float32)
    want = _torch_logits(before, tokens)
    assert np.array_equal(_torch_logits(after, tokens), want)
    assert relative(model.logits(params, tokens), want) < 2e-5
