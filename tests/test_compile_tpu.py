"""Programs compiled for TPUs that are not there: that they compile, and what the compiler makes of a cache."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.cli import in_a_line

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = ["--rollout.prompts_per_step", "4", "--rollout.num_samples", "4", "--model.dtype", "bfloat16"]
ROWS, COLUMNS = 4, 24  # of a cache on each of four devices

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu; pip install 'grpo_jax[tpu]'"),
]
UNKEPT = pytest.mark.filterwarnings("ignore:Error reading persistent")
"""What is compiled for devices that are not there is not read back from the cache."""


def run(*words):
    command = [sys.executable, str(SCRIPTS / "compile_tpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [[], ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--algorithm.loss.kl_coef", "0.1"]])
def test_a_step_compiles(cut):
    done = run("--topology", "v5e:2x2", *SMALL, *cut)
    assert done.returncode == 0, done.stderr
    head, *rows = [line for line in done.stdout.splitlines() if line]
    assert head.startswith("4 x TPU v5 lite")
    names = [row.split("|")[1].strip() for row in rows[2:]]
    expected = [
        "decode view",
        "prefill",
        "segment",
        "segment",
        "move",
        "move",
        *(["logprobs"] if cut else []),
        "update",
    ]
    assert len(names) == len(expected) and all(map(str.startswith, names, expected))
    sizes = [[int(size.replace(",", "")) for size in row.split("|")[3:6]] for row in rows[2:]]
    for name, (arguments, results, _) in zip(names, sizes, strict=True):
        if name.startswith(("segment", "update")):  # both write over what they are given
            assert arguments > 0 and results == 0


@pytest.fixture
def compile_tpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compile_tpu")


def first_segment(compile_tpu, *words):
    """The model's facts, and the text of what decodes first."""
    config, _ = compile_tpu.parse([*SMALL, *words])
    model = compile_tpu.describe(config, None, compile_tpu.topology("v5e:2x2"))
    lower = next(lower for title, lower in compile_tpu.programs(config, model, 16) if title.startswith("segment"))
    return model.spec, lower().compile().as_text()


@UNKEPT
@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_a_loop_that_decodes_leaves_the_cache_where_it_lies(compile_tpu, attention):
    """No step copies or rewrites keys and values of earlier segments; with columns written in place each would."""
    words = ["--rollout.max_new_tokens", str(COLUMNS), "--rollout.attention", attention]
    spec, text = first_segment(compile_tpu, *words)
    kv_heads, width = spec.layers[0].kv_heads, spec.layers[0].head_dim
    shape = rf"bf16\[{ROWS},{kv_heads},(?:{COLUMNS},{width}|{width},{COLUMNS})\]"
    assert re.search(rf"= {shape}\S* parameter\(", text)
    loop = "".join(
        part for part in text.split("\n\n") if not part.startswith("ENTRY") and "fused_comp" not in part[:40]
    )
    moved = re.findall(rf"= {shape}\S* (?:copy|fusion|scatter)\(", loop)
    assert bool(moved) == (attention == "dense")


@UNKEPT
def test_decoding_makes_no_float32_of_the_embedding(compile_tpu):
    spec, text = first_segment(compile_tpu, "--mesh.tensor", "2")
    assert f"bf16[{spec.vocab // 2},{spec.width}]" in text and f"f32[{spec.vocab // 2},{spec.width}]" not in text


@pytest.mark.parametrize("words", [["--topology", "v99:2x2"], ["--shapes", "/nowhere/at/all", "--topology", "v5e:2x2"]])
def test_what_is_not_there_is_said_in_a_line(compile_tpu, capsys, words):
    assert in_a_line(lambda: compile_tpu.main(words)) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    assert said.startswith("error: --topology" if "v99:2x2" in words else "error: model.path")
