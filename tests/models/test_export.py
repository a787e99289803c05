"""scripts/export_hf.py: any checkpoint of a run as a Hugging Face directory, from its parameters alone."""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.config import TrainConfig
from grpo_jax.data import load_tokenizer
from grpo_jax.models import load_model
from grpo_jax.testing import tiny_checkpoint
from grpo_jax.types import TrainState

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "export_hf.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with checkpoints of the steps 3 and 7, and what was trained to step 7."""
    base = tmp_path_factory.mktemp("export")
    source, directory = tiny_checkpoint(base / "model"), base / "run"
    model, params = load_model(source)
    directory.mkdir()
    config = TrainConfig.from_tables({"model": {"path": str(source)}, "output_dir": str(directory)})
    (directory / "config.toml").write_text(config.to_toml())
    store, trained = CheckpointStore(directory, keep=2), {}
    for step in (3, 7):
        trained[step] = model.scale_matrices(params, step)
        state = TrainState(trained[step], optax.adam(1.0).init(params), jnp.int32(step))
        store.save(step, state, {"step": step})
    store.close()
    return source, directory, trained


def _export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    return ended.value.code


def test_the_newest_checkpoint(run, monkeypatch, capsys):
    source, directory, trained = run
    assert _export(monkeypatch, directory) == 0
    assert capsys.readouterr().out.strip() == str(directory / "hf-7")
    jax.tree.map(np.testing.assert_array_equal, load_model(directory / "hf-7")[1], trained[7])
    for name in ("config.json", "tokenizer.json"):
        assert (directory / "hf-7" / name).read_bytes() == (source / name).read_bytes()


def test_the_chat_template_is_the_one_trained_with(run, monkeypatch, tmp_path):
    source, directory, _ = run
    own, tokenizer = tmp_path / "own.jinja", source / "tokenizer_config.json"
    own.write_text("{{ messages[0].content }}\r\n")
    before, recorded = tokenizer.read_text(), (directory / "config.toml").read_text()
    tokenizer.write_text(json.dumps(json.loads(before) | {"chat_template": "older"}))
    (source / "chat_template.json").write_text('{"chat_template": "oldest"}')
    (directory / "config.toml").write_text(recorded.replace('chat_template = "none"', f'chat_template = "{own}"'))
    try:
        assert _export(monkeypatch, directory, "--out", tmp_path / "x") == 0
    finally:
        tokenizer.write_text(before)
        (source / "chat_template.json").unlink()
        (directory / "config.toml").write_text(recorded)
    assert load_tokenizer(tmp_path / "x").chat_template.strip() == "{{ messages[0].content }}"
    written = json.loads((tmp_path / "x" / "tokenizer_config.json").read_text())
    assert written == json.loads(before) and not (tmp_path / "x" / "chat_template.json").exists()


def test_a_step_a_place_and_a_dtype(run, monkeypatch, tmp_path):
    _, directory, trained = run
    assert _export(monkeypatch, directory, "--step", 3, "--out", tmp_path / "x", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), trained[3])
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "x")[1], rounded)


def test_what_is_not_there_is_named(run, monkeypatch, capsys, tmp_path):
    _, directory, _ = run
    assert _export(monkeypatch, directory, "--step", 5) == 2
    assert "no checkpoint of step 5; there are: 3, 7" in capsys.readouterr().err
    assert _export(monkeypatch, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: ") and "it is no run" in said and said.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()
