"""Configs and the command line: what is read back, refused by name, and shown by --help."""

import ast
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.algo.spec import PRESETS, LossConfig
from grpo_jax.cli import parse
from grpo_jax.config import AlgorithmConfig, ModelConfig, Section, TrainConfig, fields

ROOT = Path(__file__).parent.parent


def leaves(section: Section, prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        out |= leaves(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return out


@pytest.mark.parametrize("preset", PRESETS)
def test_toml_reads_back_the_same_config_none_included(tmp_path, preset):
    config = TrainConfig.from_tables(
        {"algorithm": {"preset": preset}, "eval": {"every": None}, "reward": {"weights": [0.1]}, "steps": 3}
    )
    assert None in leaves(config).values()
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert TrainConfig.from_toml(tmp_path / "config.toml") == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_given(preset):
    config = TrainConfig.from_tables({"algorithm": {"preset": preset, "loss": {"entropy_coef": 0.01}}})
    recipe = PRESETS[preset]
    expected = dataclasses.replace(recipe.loss, entropy_coef=0.01)
    if expected.aggregation == "constant":
        expected = dataclasses.replace(expected, max_completion_len=config.rollout.max_new_tokens)
    assert config.loss == expected
    assert config.algorithm.advantage == recipe.advantage
    assert config.algorithm.soft_overlong == recipe.soft_overlong


def test_the_loss_table_has_every_field_of_the_loss():
    table = set(type(TrainConfig().algorithm.loss).model_fields)
    assert table == {f.name for f in dataclasses.fields(LossConfig)} - {"max_completion_len"}


def test_command_line_over_file_over_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('steps = 7\n[algorithm]\npreset = "dapo"\n[rollout]\ntop_k = 5\n')
    config, name = parse([str(file), "--optim.learning_rate", "2e-6", "--rollout.top_k", "none", "--log.quiet", "true"])
    assert (name, config.steps, config.optim.learning_rate, config.rollout.top_k) == ("mine", 7, 2e-6, None)
    assert config.log.quiet and config.loss.clip_high == 0.28
    config, _ = parse([str(file), "--algorithm.preset", "dr_grpo"])
    assert config.loss.aggregation == "constant" and config.loss.clip_high == 0.2
    config, _ = parse([str(file), "--algorithm.preset=gspo", "--algorithm.loss.clip_high", "0.01"])
    assert (config.loss.ratio_level, config.loss.clip_high, config.loss.clip_low) == ("sequence", 0.01, 3e-4)


@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"stepz": 3}, "stepz"),
        ({"rollout": {"num_samples": 1}}, "rollout.num_samples"),
        ({"rollout": {"num_samples": 1_000_000_000}}, "rollout.num_samples"),
        ({"optim": {"learning_rate": -1.0}}, "optim.learning_rate"),
        ({"algorithm": {"loss": {"clip_highs": 0.1}}}, "algorithm.loss.clip_highs"),
        ({"optim": {"minibatches": 5}}, "optim.minibatches"),
        ({"reward": {"functions": ["a", "b"], "weights": [1.0]}}, "reward.weights"),
        ({"reward": {"functions": []}}, "reward.functions"),
        ({"batch": {"rows": "padded", "row_len": 64}}, "batch.row_len"),
        ({"algorithm": {"loss": {"surrogate": "reinforce"}}, "optim": {"epochs": 2}}, "algorithm.loss"),
        ({"algorithm": {"loss": {"dual_clip": 0.5}}}, "algorithm.loss"),
        ({"algorithm": {"preset": "ppo", "loss": {"ratio_level": "sequence"}}}, "algorithm.loss"),
        ({"algorithm": {"preset": "ppo", "loss": {"surrogate": "gmpo"}}}, "algorithm.loss"),
        ({"critic": {"learning_rate": 1e-4}}, "critic"),
        ({"algorithm": {"preset": "ppo"}, "critic": {"value_coef": 0.5}}, "critic.value_coef"),
        ({"algorithm": {"advantage": "pass_at_k"}}, "algorithm.pass_k"),
        ({"algorithm": {"pass_k": 2}}, "algorithm.pass_k"),
        ({"algorithm": {"advantage": "pass_at_k", "pass_k": 9}}, "algorithm.pass_k"),
        ({"algorithm": {"weight": "tokens"}}, "algorithm.weight"),
        ({"algorithm": {"whiten": True}}, "algorithm.whiten"),
        ({"algorithm": {"lam": 0.5}}, "algorithm.gamma"),
        ({"algorithm": {"advantage": "grop"}}, "algorithm.advantage"),
        ({"algorithm": {"loss": {"surrogate": "ppo"}}}, "algorithm.loss.surrogate"),
        ({"algorithm": {"loss": {"kl_in_reward": True, "kl_coef": 0.0}}}, "algorithm.loss.kl_in_reward"),
        (
            {"algorithm": {"preset": "gdpo", "loss": {"kl_in_reward": True, "kl_coef": 0.1}}},
            "algorithm.loss.kl_in_reward",
        ),
        ({"algorithm": {"preset": "gdpo", "soft_overlong": True}}, "algorithm.soft_overlong"),
        ({"algorithm": {"preset": "gdpo", "reward_clip": 1.0}}, "algorithm.reward_clip"),
        ({"algorithm": {"overlong_buffer_len": 8}}, "algorithm.overlong_buffer_len"),
        ({"algorithm": {"preset": "dapo", "adaptive_kl": {"target": 1.0}}}, "algorithm.adaptive_kl.target"),
        ({"algorithm": {"adaptive_kl": {"target": 1.0, "horizon": 51.2}}}, "algorithm.adaptive_kl.horizon"),
        ({"algorithm": {"adaptive_entropy": {"target": 1.0, "low": 0.1}}}, "algorithm.adaptive_entropy"),
        ({"algorithm": {"preset": "dapo", "reference_follow": {"every": 8}}}, "algorithm.reference_follow.every"),
        ({"algorithm": {"soft_overlong": True}, "reward": {"functions": ["soft_overlong"]}}, "algorithm.soft_overlong"),
        ({"algorithm": {"max_rounds": 5}}, "algorithm.max_rounds"),
        ({"algorithm": {"loss": {"correction_high": 3.0}}}, "algorithm.loss.correction_high"),
        ({"algorithm": {"loss": {"vespo_k_pos": 3.0}}}, "algorithm.loss.vespo_k_pos"),
        ({"algorithm": {"preset": "sapo", "loss": {"clip_cov_share": 0.5}}}, "algorithm.loss.clip_cov_share"),
        ({"algorithm": {"adaptive_kl": {"horizon": 3.0}}}, "algorithm.adaptive_kl.horizon"),
        ({"algorithm": {"adaptive_entropy": {"low": 0.5}}}, "algorithm.adaptive_entropy.low"),
        ({"algorithm": {"reference_follow": {"alpha": 0.5}}}, "algorithm.reference_follow.alpha"),
        ({"model": {"lora": {"alpha": 8.0}}}, "model.lora.alpha"),
        ({"mesh": {"process_id": 1}}, "mesh.process_id"),
        ({"eval": {"stop": {"at_least": 0.9, "min_delta": 0.1}}}, "eval.stop.min_delta"),
        (
            {"algorithm": {"preset": "reinforce_pp", "dynamic_sampling": True}, "rollout": {"num_samples": 1}},
            "algorithm.dynamic_sampling",
        ),
    ],
)
def test_refusals_name_the_field(tables, path):
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_tables(tables)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_surrogates_own_field_is_taken_with_it_over_any_preset(preset):
    sapo = {"preset": preset, "loss": {"surrogate": "sapo", "sapo_tau_pos": 2.0, "ratio_level": "token"}}
    assert TrainConfig.from_tables({"algorithm": sapo}).loss.sapo_tau_pos == 2.0


def test_help_shows_every_field_with_its_docstring_and_no_jax():
    out = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "scripts" / "train.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "4000"},
        timeout=240,
    )
    shown = " ".join(out.stdout.split())
    modules = {line.rsplit("|", 1)[-1].strip() for line in out.stderr.splitlines()}
    assert "pydantic" in modules and not modules & {"jax", "flax", "transformers", "orbax"}

    def check(section: Section, prefix: str = "") -> None:
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, Section):
                check(value, f"{prefix}{name}.")
                continue
            assert f"--{prefix}{name}" in shown
            assert field.description, f"{prefix}{name} has no docstring"
            assert " ".join(field.description.split()) in shown

    check(TrainConfig())


def test_every_config_in_the_repository_loads():
    files = sorted((ROOT / "configs").glob("*.toml"))
    assert files
    for file in files:
        assert TrainConfig.from_toml(file).steps > 0


def test_every_field_is_read_by_someone():
    """A field nobody reads is a promise nobody keeps: code outside the configuration asks for each name and table."""
    package = ROOT / "grpo_jax"
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "config"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = {name for path, _ in fields.leaves(TrainConfig) for name in path.split(".")}
    assert {"critic", "value_clip", "adaptive_kl", "horizon", "kl_cov_share"} <= names
    assert names - read == {"preset"}, "the preset has done its work when the config is built; the rest must be read"


def test_bfloat16_corrects_for_the_sampler_unless_told_otherwise():
    def correction(dtype, **loss):
        return TrainConfig.from_tables({"model": {"dtype": dtype}, "algorithm": {"loss": loss}}).loss.correction

    assert correction("bfloat16") == correction("bfloat16", clip_high=0.3) == "tis"
    assert correction("bfloat16", correction=None) is None and correction("bfloat16", correction="icepop") == "icepop"
    assert correction("float32") is None
    assert TrainConfig(model=ModelConfig(dtype="bfloat16")).loss.correction == "tis"
    both = {"model": ModelConfig(dtype="bfloat16"), "algorithm": AlgorithmConfig(loss={"correction": "icepop"})}
    assert TrainConfig(**both).loss.correction == "icepop" and TrainConfig(model=ModelConfig()).loss.correction is None
    whole = AlgorithmConfig(preset="dapo")  # an object says every field of its loss
    assert TrainConfig(model=ModelConfig(dtype="bfloat16"), algorithm=whole).loss.correction is None
    config = TrainConfig.from_tables({"model": {"dtype": "bfloat16"}, "algorithm": {"loss": {"correction": None}}})
    assert TrainConfig.from_tables(config.model_dump()) == config


def test_keys_and_values_that_are_rounded_are_corrected_for_like_bfloat16():
    def correction(kv_dtype, **loss):
        return TrainConfig.from_tables({"rollout": {"kv_dtype": kv_dtype}, "algorithm": {"loss": loss}}).loss.correction

    assert correction("int8") == correction("bfloat16", clip_high=0.3) == "tis" and correction("auto") is None
    assert correction("int8", correction=None) is None and correction("int8", correction="icepop") == "icepop"
    with pytest.raises(ValueError, match="rollout.kv_dtype: got 'int4', which is none of its values"):
        TrainConfig.from_tables({"rollout": {"kv_dtype": "int4"}})
    with pytest.raises(ValueError, match="rollout.attention: got 'flash', which is none of its values"):
        TrainConfig.from_tables({"rollout": {"attention": "flash"}})


@pytest.mark.parametrize("preset", ["ppo", "reinforce", "reinforce_baseline", "reinforce_pp", "remax"])
def test_one_sample_a_prompt_is_enough_where_samples_are_not_compared(preset):
    assert TrainConfig.from_tables({"algorithm": {"preset": preset}, "rollout": {"num_samples": 1}}).steps


def test_a_kl_that_is_switched_off_is_not_in_the_reward():
    config = TrainConfig.from_tables({"algorithm": {"preset": "rloo", "loss": {"kl_coef": 0.0}}})
    assert config.loss.kl_coef == 0 and not config.loss.kl_in_reward
    assert TrainConfig.from_tables({"algorithm": {"preset": "rloo"}}).loss.kl_in_reward


def _deep(kind, levels=3000):
    value = kind()
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


ODD = (None, True, "x", [], {}, [[1]], {"a": {"b": 1}}, 10**30, -(10**30), 10**400, 10**5000, 1e308, math.inf, math.nan)
ODD += ([10**30], [10**5000], _deep(list), _deep(dict), "1" * 5000, b"x", object())


@pytest.mark.parametrize("path", [name for name, _ in fields.leaves(TrainConfig)])
def test_whatever_a_field_holds_is_taken_or_refused_in_a_line_that_names_it(path):
    first, *rest = path.split(".")
    for value in ODD:
        tables = value
        for name in reversed(rest):
            tables = {name: tables}
        try:
            TrainConfig.from_tables({"output_dir": "run", first: tables})
        except ValueError as error:
            assert all(line.startswith((path, first)) for line in str(error).splitlines()), str(error)


def test_a_file_that_python_cannot_read_is_said_to_be_no_toml(tmp_path):
    for text in ("steps = " + "9" * 5000, "a = " + "[" * 5000, "a = {a=" * 3000):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(ValueError, match="c.toml is not TOML: .* Configs are TOML"):
            TrainConfig.from_toml(tmp_path / "c.toml")


@pytest.mark.parametrize(
    "path", ["optim.learning_rate", "reward.timeout_seconds", "eval.correct_above", "algorithm.eps"]
)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_is_finite_but_for_the_bounds_of_a_loss(path, value):
    table, name = path.split(".")
    with pytest.raises(ValueError, match=f"^{path}: got {value}, but it must be a finite number"):
        TrainConfig.from_tables({table: {name: value}})
    loss = {"correction": "tis", "correction_high": math.inf}
    assert TrainConfig.from_tables({"algorithm": {"loss": loss}}).loss.correction_high == math.inf
