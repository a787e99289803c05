"""Against transformers and torch: logits, gradients, and a directory that goes out and back."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from hf_cases import CASES, GRADIENTS, LONGEST, draw, draw_tokens, fields
from model_cases import LLAMA3, VALUE_AND_GRADIENT, by_hf_name, check_gradients, random_tokens, relative, whole_rows

from grpo_jax.models import balance_loss, load_model, save_hf

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    """Imported by who tests with them: it takes seconds, and every process collects this file."""
    global torch, transformers
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")


def _torch_model(case):
    config = getattr(transformers, CASES[case][0])(**fields(case))
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
    return model


def _torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    reference, tokens = _torch_model(case), draw_tokens()
    reference.save_pretrained(tmp_path)
    model, params = load_model(tmp_path, longest=LONGEST.get(case, 0))
    assert relative(model.logits(params, tokens), _torch_logits(reference, tokens)) < 2e-5


def test_logits_from_the_older_spelling(tmp_path):
    """rope_theta, rope_scaling and torch_dtype, as hub checkpoints have them."""
    reference, tokens = _torch_model("llama 3 rotary, tied"), random_tokens((2, 40))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3 | {"rope_theta": 500.0}
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, params = load_model(tmp_path)
    assert model.spec.dtype == "float32"
    assert relative(model.logits(params, tokens), _torch_logits(again, tokens)) < 2e-5
    assert relative(model.logits(params, tokens), _torch_logits(reference, tokens)) < 2e-5


def _experts_joined(named):
    """transformers 5 holds the experts of a layer as two tensors, and writes them one by one."""
    found: dict[str, list] = {}
    for name, value in sorted(named.items()):
        start, _, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        found.setdefault(f"{start}.experts.{rest.split('.')[1]}" if rest else start, []).append(value)
    joined = {name: values[0] for name, values in found.items() if ".experts." not in name}
    for name, values in found.items():
        if name.endswith(".w1"):
            both = zip(values, found[name.replace(".w1", ".w3")], strict=True)
            joined[name.replace("w1", "gate_up_proj")] = np.stack([np.concatenate(pair) for pair in both])
            joined[name.replace("w1", "down_proj")] = np.stack(found[name.replace(".w1", ".w2")])
    return joined


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_the_mean_logp(case, tmp_path):
    reference, tokens = _torch_model(case), draw_tokens()
    reference.save_pretrained(tmp_path)
    ids = torch.tensor(tokens, dtype=torch.long)
    logp = reference(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    logp.mean().backward()
    model, params = load_model(tmp_path)
    value, gradient = VALUE_AND_GRADIENT(model, params, tokens)
    assert abs(float(value) - logp.mean().item()) < 2e-5 * abs(float(value))
    got = _experts_joined(by_hf_name(model, gradient))
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    assert set(got) == set(wanted)
    check_gradients(got, wanted)


EXPORTED = {
    "qwen2 grouped, tied": "float32",
    "llama biases, head_dim apart": "bfloat16",
    "gemma3 two rotaries, cap": "bfloat16",
    "phi3 one key head, longrope, short text": "float32",
    "olmo2 grouped": "bfloat16",
    "mixtral": "float32",
    "qwen3_moe one dense layer, normalised": "bfloat16",
}


@pytest.mark.parametrize("case", EXPORTED)
def test_transformers_loads_what_is_saved(case, tmp_path):
    dtype = getattr(torch, EXPORTED[case])
    reference, tokens = _torch_model(case), random_tokens((2, 16))
    reference.to(dtype).save_pretrained(tmp_path / "in")
    model, params = load_model(tmp_path / "in")
    save_hf(model, params, tmp_path / "out", source=tmp_path / "in", shard_bytes=20_000)
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    back, info = load(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.dtype == dtype
    theirs = dict(back.named_parameters())
    for name, value in reference.named_parameters():
        assert torch.equal(value, theirs[name]), name
    before, after = load(tmp_path / "in", dtype=torch.float32), load(tmp_path / "out", dtype=torch.float32)
    want = _torch_logits(before, tokens)
    assert (_torch_logits(after, tokens) == want).all()
    assert relative(model.logits(params, tokens), want) < 2e-5


def test_the_balance_loss_is_that_of_transformers(tmp_path):
    case = "qwen3_moe every other layer, tied"
    reference, tokens = _torch_model(case), draw_tokens()
    reference.save_pretrained(tmp_path)
    output = reference(torch.tensor(tokens, dtype=torch.long), output_router_logits=True)
    output.aux_loss.backward()
    model, params = load_model(tmp_path)

    def loss(params):
        routed = model.hidden_routed(params, *whole_rows(tokens), None, None, np.ones(tokens.shape, bool))[1]
        return balance_loss(routed.probs, routed.load, tokens.size).mean(), routed.load

    (value, load), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert load.shape == (2, 4) and (load.sum(axis=1) == tokens.size).all()
    assert abs(float(value) - output.aux_loss.item()) < 2e-5 * float(value)
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters() if name.endswith("mlp.gate.weight")}
    assert len(wanted) == 2
    check_gradients(by_hf_name(model, gradient), wanted)
