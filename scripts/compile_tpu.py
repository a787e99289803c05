"""Compile a run's large programs for TPUs that are not there: whether they compile, and the memory they take.

    pip install '.[tpu]'
    python scripts/compile_tpu.py [CONFIG.toml] --topology v5e:2x2 [--shapes 0.5b] [--dotted.field value ...]

The words are train.py's, and these. XLA's TPU compiler is in libtpu and runs on any Linux machine, so that a run can be
tried before there is hardware: what does not fit in a TPU's memory does not compile. Nothing is loaded, nothing runs,
and only the facts of the model are read. Of the shapes that decode the first and the last are compiled, and of the
moves that of a layer; the small programs around them are left out. Prints a row for each program: seconds to compile,
and by the compiler's own analysis MiB on each device of arguments, of results beside those that take an argument's
place, and of temporaries.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

# ruff: noqa: E402
# The library looks for a TPU's surroundings; there are none, and no need to look.
os.environ["JAX_PLATFORMS"] = "cpu"
for name, value in {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}.items():
    os.environ.setdefault(name, value)

import jax
import numpy as np
from bench_rollout import WORKS
from jax.experimental import topologies

from grpo_jax.batching import empty_rows
from grpo_jax.cli import in_a_line, parse
from grpo_jax.config import TrainConfig
from grpo_jax.data import resolve_model
from grpo_jax.learner.learning import adapted, layout_of, make_learner
from grpo_jax.mesh import batch_sharding, make_mesh
from grpo_jax.models import Model
from grpo_jax.models.model import _decode_view
from grpo_jax.models.spec import ModelSpec
from grpo_jax.rollout import sampling_from
from grpo_jax.rollout.programs import Programs
from grpo_jax.rollout.setup import decoder, engine_from
from grpo_jax.types import TrainBatch

HEADING = "| program | s | arguments | results | temporaries |\n|---|---|---|---|---|"
MIB = 2**20


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="as the compiler names it: v5e:2x2, v6e:4x4, v5p:2x2x1")
    parser.add_argument(
        "--shapes", help="another checkpoint or hub id, or one of 0.5b, 1.5b, 7b; default: the run's model"
    )
    parser.add_argument("--prompt_len", type=int, help="tokens of a prompt; default: data.max_prompt_len")
    parser.add_argument("--only", nargs="+", default=[], metavar="PROGRAM", help="those that begin so")
    options, rest = parser.parse_known_args(words)
    config, _ = parse(rest)
    devices = topology(options.topology)
    model = describe(config, options.shapes, devices)
    prompt_len = options.prompt_len or config.data.max_prompt_len
    print(f"{len(devices)} x {devices[0].device_kind}, {model.param_count:,} parameters\n\n{HEADING}", flush=True)
    for title, lower in programs(config, model, prompt_len):
        if not options.only or title.startswith(tuple(options.only)):
            print(line(title, lower), flush=True)


def topology(name: str) -> list[Any]:
    """Devices that can be compiled for."""
    kind, _, shape = name.partition(":")
    try:
        whole = shape if shape.count("x") == 2 else f"{shape}x1"
        return list(topologies.get_topology_desc(f"{kind}:{whole}", platform="tpu").devices)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--topology: got {name}, and no such TPU can be compiled for ({said}); pip install 'grpo_jax[tpu]', and "
            "use a kind and a shape as v5e:2x2"
        ) from error


def describe(config: TrainConfig, shapes: str | None, devices: list[Any]) -> Model:
    """The run's model on those devices, without parameters."""
    table, mesh = config.model, config.mesh
    longest = config.data.max_prompt_len + config.rollout.max_new_tokens
    model = Model(
        facts(shapes, None, longest) if shapes else facts(table.path, table.revision, longest),
        dtype=table.dtype,
        param_dtype=table.param_dtype,
        precision=table.matmul_precision,
        mesh=make_mesh(mesh.data, mesh.fsdp, mesh.tensor, mesh.expert, devices),
        remat=table.remat or "none",
    )
    return adapted(model, table.lora)


def facts(source: str, revision: str | None, longest: int) -> ModelSpec:
    """Of one of the benchmarks' models, or of a checkpoint here or on the hub."""
    if source in WORKS:
        return WORKS[source].model().spec
    directory = resolve_model(source, revision, ["config.json"])
    return ModelSpec.from_hf(json.loads((directory / "config.json").read_text()), longest)


def programs(config: TrainConfig, model: Model, prompt_len: int) -> Iterator[tuple[str, Any]]:
    """(title, how it is lowered) of what a step needs, in order; of the decode shapes the first and the last."""
    if config.algorithm.has_critic:
        raise ValueError(
            f"algorithm.advantage: got {config.algorithm.advantage}, and a critic's programs are not compiled here. "
            "Give an --algorithm.preset without a critic."
        )
    decodes = decoder(config.rollout, model).base
    base = model.base.abstract_params
    lowered = _decode_view.lower(decodes, base, decodes.compute.mesh != model.compute.mesh)
    yield "decode view", lambda: lowered
    view = placed(lowered)
    rollout = config.rollout
    engine = engine_from(rollout, decodes, prompt_len, argparse.Namespace(decode=None))
    ladder = engine.shapes(rollout.prompts_per_step, rollout.num_samples, rollout.max_new_tokens)
    made = Programs(decodes, sampling_from(rollout, [0]).rules, ladder, prompt_len, view)
    yield "prefill", lambda: made.lower(("prefill",))
    for kind in ("segment", "layer"):
        keys = [key for key in made.keys if key[0] == kind]
        for key in dict.fromkeys((keys[0], keys[-1])):
            shape = key[1]
            title = f"{kind}, {shape.rows} rows of {shape.length}" if kind == "segment" else f"move of a {kind}"
            yield title, lambda key=key: made.lower(key)
    layout = layout_of(config, model, prompt_len)
    learner = make_learner(config, model, layout, None)
    state = placed(jax.jit(learner.init).lower(model.abstract_params))
    rows, sharding = layout.row_counts[-1], batch_sharding(model.compute.mesh)
    arrays = empty_rows(rows, layout)
    several, kl = config.updates_per_step > 1, config.loss.kl_coef != 0
    arrays |= {name: arrays["sampler_logp"] for name, there in (("old_logp", several), ("ref_logp", kl)) if there}
    batch = TrainBatch(**arrays, shared=layout.shared)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
    size = f"{rows} rows of {layout.row_len}"
    if several or kl:
        yield f"logprobs, {size}", lambda: type(learner).logprobs.lower(learner, model.abstract_params, batch)
    yield f"update, {size}", lambda: type(learner).update.lower(learner, state, batch, np.int32(layout.sample_count))


def placed(lowered: Any) -> Any:
    """What a program gives: shapes, dtypes, and where the compiler lays them."""
    make = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(make, lowered.out_info, lowered.compile().output_shardings)


def line(title: str, lower: Any) -> str:
    begun = time.perf_counter()
    found = lower().compile().memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = (found.argument_size_in_bytes, fresh, found.temp_size_in_bytes)
    return f"| {title} | {time.perf_counter() - begun:.0f} | " + " | ".join(f"{x / MIB:,.0f}" for x in sizes) + " |"


if __name__ == "__main__":
    sys.exit(in_a_line(lambda: main(sys.argv[1:])))
