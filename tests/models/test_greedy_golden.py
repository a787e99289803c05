"""Greedy completions against transformers' own greedy search, token for token, from a file: no torch needed."""

import json

import numpy as np
import pytest
from fast_set import slow_but
from greedy_cases import CASES, NEW, PROMPTS, STOP
from hf_cases import draw
from model_cases import GOLDEN, write_checkpoint

from grpo_jax import generate, load_model
from grpo_jax.models.families import FAMILIES


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN.with_name("greedy_golden.npz")) as mine, np.load(GOLDEN) as models:
        return dict(mine) | {name: models[name] for name in models if name.partition("/")[0] in CASES}


FAST = ("qwen2 windows by layer types", "gemma3 two rotaries, cap", "qwen3_moe one dense layer, normalised")


@pytest.mark.parametrize("case", slow_but(FAST, CASES))
def test_greedy_is_transformers_greedy(case, golden, tmp_path):
    assert golden[f"{case}/gap"] > 1e-4  # no rounding turns the order of the two best
    shapes = json.loads(str(golden[f"{case}/shapes"]))
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    model, params = load_model(write_checkpoint(tmp_path, json.loads(str(golden[f"{case}/config"])), tensors))
    rollout = generate(model, params, PROMPTS, 1, NEW, temperature=0.0, stop_ids=[STOP])
    got = np.full((len(PROMPTS), NEW), -1, np.int32)
    for row in range(len(PROMPTS)):
        ids = rollout.completion_ids(row)
        got[row, : len(ids)] = ids
    np.testing.assert_array_equal(got, golden[f"{case}/tokens"])


def test_the_cases_stop_early_and_late_and_differ(golden):
    tokens = np.stack([golden[f"{case}/tokens"] for case in CASES])
    lengths = (tokens >= 0).sum(-1)
    assert lengths.min() < NEW == lengths.max() and len(np.unique(tokens)) > 30


def test_every_family_has_a_case(golden):
    types = [json.loads(str(golden[f"{case}/config"]))["model_type"] for case in CASES]
    assert sorted(types) == sorted(FAMILIES)
