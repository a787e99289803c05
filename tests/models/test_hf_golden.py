"""Logits and gradients of transformers, from files that scripts/make_hf_golden.py wrote; no torch needed."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from model_cases import GOLDEN, by_hf_name, mean_logp, relative, write_checkpoint

from grpo_jax.models import load_model

NAMES = ("qwen2", "llama")


@pytest.fixture(params=NAMES)
def golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        return dict(file)


def _load(golden, path):
    tensors = {name.removeprefix("tensor/"): value for name, value in golden.items() if name.startswith("tensor/")}
    return load_model(write_checkpoint(path, json.loads(str(golden["config"])), tensors))


def test_logits_are_those_of_transformers(golden, tmp_path):
    model, params = _load(golden, tmp_path)
    assert relative(model.logits(params, golden["tokens"]), golden["logits"]) < 2e-5


def test_gradients_are_those_of_transformers(golden, tmp_path):
    model, params = _load(golden, tmp_path)
    gradient = jax.jit(jax.grad(partial(mean_logp, model)))(params, golden["tokens"])
    got = by_hf_name(model, gradient)
    wanted = {name.removeprefix("gradient/"): g for name, g in golden.items() if name.startswith("gradient/")}
    assert len(wanted) >= 5
    scale = max(np.abs(want).max() for want in wanted.values())
    for name, want in wanted.items():
        assert np.abs(got[name] - want).max() < 2e-5 * scale, name


def test_the_files_are_small():
    assert sum((GOLDEN / f"{name}.npz").stat().st_size for name in NAMES) < 200_000
