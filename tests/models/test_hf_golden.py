"""Logits and gradients of transformers, from the file that scripts/make_hf_golden.py wrote; no torch needed."""

import collections
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hf_cases import CASES, GRADIENTS, LONGEST, draw, draw_tokens
from model_cases import GOLDEN, VALUE_AND_GRADIENT, by_hf_name, check_gradients, relative, write_checkpoint

from grpo_jax.models import load_model
from grpo_jax.models.families import FAMILIES


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def _load(golden, case, path):
    shapes = json.loads(str(golden[f"{case}/shapes"]))
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    checkpoint = write_checkpoint(path, json.loads(str(golden[f"{case}/config"])), tensors)
    return load_model(checkpoint, longest=LONGEST.get(case, 0))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, golden, tmp_path):
    model, params = _load(golden, case, tmp_path)
    assert relative(model.logits(params, draw_tokens())[0], golden[f"{case}/logits"]) < 2e-5


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_those_of_transformers(case, golden, tmp_path):
    model, params = _load(golden, case, tmp_path)
    got = by_hf_name(model, VALUE_AND_GRADIENT(model, params, draw_tokens())[1])
    start = f"{case}/gradient/"
    wanted = {name.removeprefix(start): value for name, value in golden.items() if name.startswith(start)}
    assert len(wanted) >= 5
    check_gradients(got, wanted)


def test_every_family_has_cases(golden):
    types = {json.loads(str(golden[f"{case}/config"]))["model_type"] for case in CASES}
    assert types == set(FAMILIES)


@pytest.mark.parametrize("page", ["README.md", "docs/MODELS.md"])
def test_the_pages_tables_say_what_is_tested(page, golden):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if re.match(r"\| `\w+` \| .* \| logits", line)]
    rows = {line.split("`")[1]: line.split(" | ")[3] for line in tables}
    types = {case: json.loads(str(golden[f"{case}/config"]))["model_type"] for case in CASES}
    counts = collections.Counter(types.values())
    assert {family: int(re.search(r"\d+", tested).group()) for family, tested in rows.items()} == counts
    assert {family for family, tested in rows.items() if "gradient" in tested} == {types[case] for case in GRADIENTS}


def test_the_file_is_small():
    assert GOLDEN.stat().st_size < 500_000
