"""A layout of its own for decoding: the same devices cut otherwise, the same tokens, the same updates."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_engine import PROMPTS, assert_same_but_for_boundaries

import grpo_jax
from grpo_jax.config import RolloutConfig, TrainConfig
from grpo_jax.mesh import make_mesh
from grpo_jax.metrics import read_json_lines
from grpo_jax.rollout import ContinuousEngine, Sampling, generate
from grpo_jax.rollout.programs import Programs
from grpo_jax.rollout.setup import decoder
from grpo_jax.testing import tiny_checkpoint, tiny_model

VOCAB, WIDTH, HEADS, INNER = 64, 32, 2, 48
LAYOUTS = {"train": (1, 8, 1), "replicated": (8, 1, 1), "tensor=2": (4, 1, 2), "tensor=1": (8, 1, 1)}


@pytest.fixture(scope="module")
def cut():
    """Weights cut over eight devices along fsdp."""
    return tiny_model(make_mesh(1, 8), vocab_size=VOCAB, dtype="float32")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_rows_lie_as_the_table_says(cut, layout):
    model, params = cut
    decodes = decoder(RolloutConfig(layout=layout), model)
    mesh, tensor = decodes.compute.mesh, LAYOUTS[layout][2]
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == LAYOUTS[layout]
    assert [d.id for d in mesh.devices.flat] == [d.id for d in model.compute.mesh.devices.flat]
    view = decodes.decode_view(params)

    def shards(x):
        return {shard.data.shape for shard in x.addressable_shards}

    assert shards(params["outer"]["embed"]["kernel"]) == {(VOCAB, WIDTH // 8)}
    assert shards(view.outer["embed"]["kernel"]) == {(VOCAB // tensor, WIDTH)}
    layer = view.layers[1]
    assert shards(layer["attention"]["qkv"]["kernel"]) == {(WIDTH, 1, HEADS // tensor * 4 * 8)}
    assert shards(layer["mlp"]["down"]["kernel"]) == {(INNER // tensor, WIDTH)}
    cache = jax.tree.leaves(jax.jit(decodes.init_cache, static_argnums=(0, 1))(16, 8))
    assert {shape[:2] for x in cache for shape in shards(x)} == {(16 * tensor // 8, HEADS // tensor)}


@pytest.mark.parametrize("layout", ["replicated", "tensor=2"])
def test_contract_4_tokens_do_not_depend_on_the_layout(cut, layout):
    model, params = cut
    call = {"num_samples": 4, "max_new_tokens": 16, "stop_ids": [1]}
    want = generate(model, params, PROMPTS, **call)
    got = generate(decoder(RolloutConfig(layout=layout), model), params, PROMPTS, **call)
    assert_same_but_for_boundaries(model, params, want, got, range(len(PROMPTS)), 4)
    assert want.completion_len.sum() > 100
    same = (got.tokens == want.tokens).all(1)
    assert same.mean() > 0.8
    np.testing.assert_allclose(got.sampler_logp[same], want.sampler_logp[same], rtol=0, atol=1e-4)


def test_devices_that_decode_together_talk_little():
    """Twice a layer; and of a cut vocabulary for the embedding, the largest logit, the blocks, the block, the token."""
    model, params = tiny_model(make_mesh(1, 1, 2, devices=jax.devices()[:2]), vocab_size=512)
    engine, rules = ContinuousEngine(model, 8), Sampling(max_new_tokens=8).rules
    programs = Programs(model, rules, engine.shapes(2, 4, 8), 8, engine.view(params))
    key = next(key for key in programs.keys if key[0] == "segment")
    text = programs.lower(key).compile().as_text()
    talks = re.findall(r" (?:all-reduce|all-gather|collective-permute|all-to-all)\(", text)
    greedy = 2  # where nothing is drawn, on a branch of its own
    assert 2 * len(model.spec.layers) < len(talks) <= 2 * len(model.spec.layers) + 5 + greedy


def test_what_cannot_be_is_refused(cut):
    with pytest.raises(ValueError, match=r"got tensor=3 for 8 device\(s\); use a size among 1, 2, 4, 8"):
        decoder(RolloutConfig(layout="tensor=3"), cut[0])
    for wrong in ("tensor=0", "tensor", "tensr=2"):
        with pytest.raises(ValueError, match=f"rollout.layout: got '{wrong}', which is none of its values"):
            TrainConfig.from_tables({"rollout": {"layout": wrong}})


def evens(prompts, completions, completion_ids, **columns):
    return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]


@pytest.mark.slow  # two runs; that the layout changes neither tokens nor log-probabilities is seen above
def test_the_update_does_not_depend_on_the_layout(tmp_path):
    """Trained cut over fsdp, sampled with the heads cut over two: what is learned is the same."""
    checkpoint = tiny_checkpoint(tmp_path / "model", vocab_size=VOCAB, num_hidden_layers=1)
    learned, said = [], []
    for layout in ("train", "tensor=2"):
        config = TrainConfig.from_tables(
            {
                "steps": 1,
                "output_dir": str(tmp_path / layout),
                "compilation_cache": None,
                "rollout": {"prompts_per_step": 2, "num_samples": 4, "max_new_tokens": 4, "layout": layout},
                "mesh": {"data": 1, "fsdp": 8},
                "optim": {"learning_rate": 1e-3},
                "log": {"quiet": True, "completions": 16},
            }
        )
        grpo_jax.Trainer(checkpoint, evens, [{"prompt": f"{a}+1="} for a in range(8)], config=config).train()
        learned.append(load_file(tmp_path / layout / "hf" / "model.safetensors"))
        said.append([row["completion"] for row in read_json_lines(tmp_path / layout / "completions.jsonl")])
    start = load_file(checkpoint / "model.safetensors")
    assert said[0] == said[1]
    for name, want in learned[0].items():
        assert np.abs(learned[1][name] - want).max() <= 1e-6 * np.abs(want).max()
    assert max(np.abs(want - start[name]).max() for name, want in learned[0].items()) > 5e-4
