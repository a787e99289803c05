"""Directories out and back bitwise, crashes on the way, and every refusal by its name."""

import json
import os
import struct
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import FAMILY_CASES, by_hf_name, config, random_model, random_tokens, write_checkpoint
from safetensors.numpy import load_file

import grpo_jax.models.checkpoint_files as checkpoint_files
import grpo_jax.models.hf as hf
from grpo_jax.mesh import make_mesh
from grpo_jax.models import Model, ModelSpec, load_model, save_hf


def _tensors(dtype="float32", **fields):
    model, params = random_model(**fields)
    return {name: value.astype(jnp.dtype(dtype)) for name, value in by_hf_name(model, params).items()}


def _write(directory, dtype="float32", **fields):
    return write_checkpoint(directory, config(dtype=dtype, **fields), _tensors(dtype, **fields))


def _all_tensors(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _same_bits(one, two):
    assert set(one) == set(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype and value.tobytes() == two[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 6_000])
@pytest.mark.parametrize("tied", [True, False])
def test_load_save_load_is_the_identity(dtype, shard_bytes, tied, tmp_path):
    source = _write(tmp_path / "in", dtype, tie_word_embeddings=tied)
    model, params = load_model(source)
    save_hf(model, params, tmp_path / "out", source=source, shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() is (shard_bytes < 10**9)
    _same_bits(_all_tensors(tmp_path / "out"), _all_tensors(source))
    again, reloaded = load_model(tmp_path / "out")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_the_same_in_pieces_of_any_size(dtype, tmp_path, monkeypatch):
    """phi3 joins tensors, so that pieces also begin in the middle of one."""
    source = _write(tmp_path / "in", dtype, **FAMILY_CASES["phi3"])
    model, params = load_model(source)
    monkeypatch.setattr(checkpoint_files, "PIECE", 7)
    jax.tree.map(np.testing.assert_array_equal, load_model(source)[1], params)
    _same_bits({k: v.astype(jnp.dtype(dtype)) for k, v in by_hf_name(model, params).items()}, _all_tensors(source))


def test_what_is_read_is_the_parameter_without_a_copy(tmp_path, monkeypatch):
    """On one CPU device, so that a load needs no more memory than the parameters."""
    buffers, fresh = [], hf._fresh
    monkeypatch.setattr(hf, "_fresh", lambda *args: buffers.append(fresh(*args)) or buffers[-1])
    _, params = load_model(_write(tmp_path / "in", "bfloat16"))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]
    assert places == [buffer.ctypes.data for buffer in buffers]


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    source = _write(tmp_path / "in")
    opened = hf.open_tensors(source)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    monkeypatch.setattr(hf, "open_tensors", lambda directory: opened)
    with pytest.raises(ValueError, match=r"got \d+ bytes less of model\..* than before"):
        load_model(source)


def test_files_have_the_permissions_of_any_file(tmp_path):
    source = _write(tmp_path / "in")
    save_hf(*load_model(source), tmp_path / "out", source=source, shard_bytes=6_000)
    (tmp_path / "any").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_shards_keep_to_their_size_and_are_all_listed(tmp_path):
    source = _write(tmp_path / "in")
    save_hf(*load_model(source), tmp_path / "out", source=source, shard_bytes=9_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sizes = []
    for file in files:
        held = load_file(tmp_path / "out" / file)
        size = sum(value.nbytes for value in held.values())
        assert size <= 9_000 or len(held) == 1
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
        sizes.append(size)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(one + next_one > 9_000 for one, next_one in pairwise(sizes))  # none is left half empty


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    tensors = _tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    source = write_checkpoint(tmp_path / "in", config(), tensors)
    save_hf(*load_model(source), tmp_path / "out", source=source)
    _same_bits(_all_tensors(tmp_path / "out"), tensors)


def test_sharded_parameters_are_saved_alike(tmp_path):
    source = _write(tmp_path / "in")
    model, params = load_model(source, mesh=make_mesh(2, 2, 2))
    assert len(params["outer"]["embed"]["kernel"].sharding.device_set) == 8
    save_hf(model, params, tmp_path / "out", source=source)
    _same_bits(_all_tensors(tmp_path / "out"), _all_tensors(source))


@pytest.mark.parametrize(("key", "want"), [("dtype", "bfloat16"), ("torch_dtype", "float16")])
def test_another_dtype_by_argument(key, want, tmp_path):
    written = config() | {key: config().pop("dtype"), "extra": {"kept": [1, None]}}
    if key == "torch_dtype":
        del written["dtype"]
    source = write_checkpoint(tmp_path / "in", written, _tensors())
    save_hf(*load_model(source), tmp_path / "out", source=source, dtype=want)
    assert {value.dtype for value in _all_tensors(tmp_path / "out").values()} == {jnp.dtype(want)}
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved.pop("architectures") == ["Qwen2ForCausalLM"]
    assert saved == written | {key: want}


def test_param_dtype_is_what_is_stored(tmp_path):
    source = _write(tmp_path / "in", "bfloat16")
    model, params = load_model(source, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert (model.dtype, model.param_dtype, model.precision, model.remat) == ("bfloat16", "bfloat16", "default", "full")
    wide = load_model(source)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), params, wide)


def test_without_a_source_the_config_is_the_models(tmp_path):
    fields = config("llama", dtype="bfloat16", note="kept")
    model = Model(ModelSpec.from_hf(fields))
    params = model.init(0)
    save_hf(model, params, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved == {"architectures": ["LlamaForCausalLM"]} | fields
    again, reloaded = load_model(tmp_path / "out")
    assert again == model
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), params, reloaded)


def test_config_and_small_files_come_along_unchanged(tmp_path):
    source = _write(tmp_path / "in")
    small = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": '{"eos_token_id": [5, 2]}',
    }
    for name, text in small.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_text("never read, never copied")
    odd = (source / "config.json").read_text().replace("{", '{ "unknown_field" : 1e-05, ', 1)
    (source / "config.json").write_text(odd)
    model, params = load_model(source)
    assert model.spec.stop_ids == (2, 5)
    save_hf(model, params, tmp_path / "out", source=source)
    assert (tmp_path / "out" / "config.json").read_text() == odd
    for name, text in small.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_an_older_checkpoint_is_replaced_and_the_rest_stays(tmp_path):
    source = _write(tmp_path / "in")
    model, params = load_model(source)
    save_hf(model, params, tmp_path / "out", source=source, shard_bytes=6_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    doubled = model.scale_matrices(params, 2.0)
    save_hf(model, doubled, tmp_path / "out", source=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "out")[1], doubled)


def test_a_crash_leaves_the_old_checkpoint_or_none(tmp_path, monkeypatch):
    source = _write(tmp_path / "in")
    model, params = load_model(source)
    target = tmp_path / "out"
    save_hf(model, params, target, source=source)
    doubled = model.scale_matrices(params, 2.0)

    def crash(after, function, name):
        calls = [0]

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] > after:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(*name, counted)
            with pytest.raises(KeyboardInterrupt):
                save_hf(model, doubled, target, source=source, shard_bytes=6_000)

    for after in (0, 2):
        crash(after, hf.save_file, (hf, "save_file"))
        jax.tree.map(np.testing.assert_array_equal, load_model(target)[1], params)
    crash(2, os.replace, (os, "replace"))
    with pytest.raises(ValueError, match=r"without config\.json"):
        load_model(target)
    save_hf(model, doubled, target, source=source)
    jax.tree.map(np.testing.assert_array_equal, load_model(target)[1], doubled)
    assert not list(target.glob("*.partial"))


def test_harmless_extras_are_not_read(tmp_path):
    tensors = _tensors()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_checkpoint(tmp_path / "in", config(), tensors)
    model, params = load_model(source)
    _same_bits(by_hf_name(model, params), _tensors())


def _edit(**changes):
    """Tensors with some replaced, or removed where the value is None."""
    tensors = _tensors() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


NORM = "model__layers__1__input_layernorm__weight"
TENSORS = {
    "missing": ({NORM: None}, ["no tensor model.layers.1.input_layernorm.weight"]),
    "unexpected": ({"model__layers__3__extra": np.ones(2, np.float32)}, ["unexpected", "model.layers.3.extra"]),
    "misshapen": ({NORM: np.ones(33, np.float32)}, ["model.layers.1.input_layernorm.weight", "(33,)", "(32,)"]),
    "transposed": (
        {"model__layers__0__mlp__up_proj__weight": np.ones((32, 40), np.float32)},
        ["mlp.up_proj.weight", "(32, 40)", "(40, 32)"],
    ),
    "integers": ({NORM: np.ones(32, np.int8)}, ["model.layers.1.input_layernorm.weight", "I8"]),
    "untied head": ({"lm_head__weight": np.ones((61, 32), np.float32)}, ["lm_head.weight", "tie_word_embeddings"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(case, tmp_path):
    changes, words = TENSORS[case]
    source = write_checkpoint(tmp_path / "in", config(), _edit(**changes))
    with pytest.raises(ValueError) as caught:
        load_model(source)
    for word in (*words, str(source)):
        assert word in str(caught.value)


def test_an_untied_checkpoint_needs_its_head(tmp_path):
    source = write_checkpoint(tmp_path / "in", config(tie_word_embeddings=False), _tensors())
    with pytest.raises(ValueError, match=r"no tensor lm_head\.weight"):
        load_model(source)


def _header(text, body=b""):
    return struct.pack("<Q", len(text)) + text + body


FILES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(b"\x80\x04pickle" * 9),
    "absurd header length": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "absurd shape": lambda path: path.write_bytes(
        _header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,9],"data_offsets":[0,4]}}', b"1234")
    ),
    "overlapping tensors": lambda path: path.write_bytes(
        _header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
            b"123456",
        )
    ),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_files(case, tmp_path):
    source = _write(tmp_path / "in")
    FILES[case](source / "model.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        load_model(source)


def test_a_checkpoint_cloned_without_its_large_files(tmp_path):
    _write(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"model.safetensors: got a pointer of Git LFS, .*; run git lfs pull there"):
        load_model(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"without config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="only safetensors is read"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        load_model(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", "[" * 100_000])
def test_configs_that_are_no_json_object(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)


def test_an_unsupported_config_names_the_directory_and_the_field(tmp_path):
    source = write_checkpoint(tmp_path / "in", config(hidden_act="tanh"), _tensors())
    with pytest.raises(ValueError, match="hidden_act") as caught:
        load_model(source)
    assert str(source) in str(caught.value)


OUTSIDE = ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", "a\0b", 7, None]


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_cannot_point_outside(file, tmp_path):
    source = _write(tmp_path / "in")
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {name: file for name in _tensors()}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain name of a file beside the index"):
        load_model(source)


def test_an_index_must_fit_its_files(tmp_path):
    source = _write(tmp_path / "in")
    (source / "model.safetensors").rename(source / "a.safetensors")
    index = source / "model.safetensors.index.json"
    names = {name: "a.safetensors" for name in _tensors()}
    index.write_text(json.dumps({"weight_map": names}))
    assert load_model(source)[0].spec.vocab == 61
    for broken, words in (
        ({"weight_map": names | {"model.norm.weight": "b.safetensors"}}, "b.safetensors"),
        ({"weight_map": names | {"model.other": "a.safetensors"}}, "model.other"),
        ({"weight_map": {}}, "weight_map"),
        ([], "JSON object"),
    ):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=words):
            load_model(source)
    (source / "b.safetensors").write_bytes((source / "a.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": names | {"model.norm.weight": "b.safetensors"}}))
    with pytest.raises(ValueError, match="twice"):
        load_model(source)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_index_must_name_plain_files(make, tmp_path):
    source = _write(tmp_path / "in")
    (source / "model.safetensors").unlink()
    make(source / "a.safetensors")
    index = {"weight_map": {name: "a.safetensors" for name in _tensors()}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a\.safetensors: got no plain file"):
        load_model(source)


def test_save_refuses_what_would_not_load(tmp_path):
    model, params = load_model(_write(tmp_path / "in"))
    with pytest.raises(ValueError, match="'int8'"):
        save_hf(model, params, tmp_path / "out", dtype="int8")
    other = _write(tmp_path / "other", vocab_size=62)
    with pytest.raises(ValueError, match="another model"):
        save_hf(model, params, tmp_path / "out", source=other)
    with pytest.raises(ValueError, match="no such directory"):
        save_hf(model, params, tmp_path / "out", source=tmp_path / "nowhere")
    odd = replace(model.spec.layers[0], ffn=41)
    changed = Model(replace(model.spec, layers=(odd,) * 3))
    with pytest.raises(ValueError, match="another model"):
        save_hf(changed, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loaded_values_are_those_of_the_file(tmp_path):
    source = _write(tmp_path / "in")
    model, params = load_model(source)
    _same_bits(by_hf_name(model, params), load_file(source / "model.safetensors"))
    assert model.logits(params, random_tokens((1, 4))).shape == (1, 4, 61)
