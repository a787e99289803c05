"""Before the first compile: what the run will hold in each device's memory, and on what it runs."""

import importlib.metadata
import os
import platform as this_machine
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # whether jax has started is said nowhere public

from grpo_jax.batching import Layout
from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream
from grpo_jax.models import Model
from grpo_jax.rewards import RewardPool
from grpo_jax.rollout.setup import decoder, token_bytes

PACKAGES = ("grpo_jax", "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "transformers", "numpy")

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

CACHE_SHARE = 0.9
"""Of a device's memory, that is planned with: what a step of decoding computes in takes the rest."""


def versions() -> dict[str, str]:
    """Package versions, Python and the kind of device."""
    found = {name: _version(name) for name in PACKAGES}
    device = jax.devices()[0]
    return found | {"python": this_machine.python_version(), "device": f"{len(jax.devices())} x {device.device_kind}"}


def be_deterministic() -> None:
    """Ask XLA for deterministic operations on GPUs, which it reads when jax starts.

    Raises:
        ValueError: jax has started on a GPU without.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    if DETERMINISTIC in flags:
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = " ".join([*flags, DETERMINISTIC])
    elif jax.default_backend() == "gpu":
        raise ValueError(
            "deterministic: got true, and jax has already started in this process, where XLA asks no more; make the "
            f'Trainer and train before anything else uses jax, or set XLA_FLAGS="{DETERMINISTIC}" before Python starts'
        )


def require_devices(platform: str | None) -> None:
    """Start jax's backend, on the kind of device that is asked for.

    Args:
        platform: "cpu", "gpu" or "tpu"; None: what jax finds.

    Raises:
        ValueError: there is no such device, or the JAX_PLATFORMS of the environment cannot be had.
    """
    asked = os.environ.get("JAX_PLATFORMS") or "none"
    install = "install grpo_jax[cuda] or grpo_jax[tpu] where the hardware is there"
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax asserts where its plugin for CUDA is missing
        said = f" (jax: {str(error).partition('(set JAX')[0].strip()})" if str(error) else ""
        raise ValueError(
            f"JAX_PLATFORMS: got {asked}, and jax finds no such device{said}; {install}, or unset JAX_PLATFORMS"
        ) from error
    if platform is not None and found != platform:
        raise ValueError(
            f"mesh.platform: got {platform}, and jax finds {found} only ({jax.devices()[0].device_kind}); {install}, "
            "or set mesh.platform none"
        )


def check_model(config: TrainConfig, model: Model, longest: int, prompt_len: int) -> None:
    """Refuse a config that asks of the model what it does not have.

    Args:
        config: of the run.
        model: as it was loaded.
        longest: tokens of the longest prompt.
        prompt_len: tokens to which prompts are padded.

    Raises:
        ValueError: more positions or other tokens than the model has, or a balance of experts that are not there.
    """
    rollout, spec = config.rollout, model.spec
    if prompt_len + rollout.max_new_tokens > spec.max_len:
        raise ValueError(
            f"rollout.max_new_tokens: got {rollout.max_new_tokens}, with prompts of up to {longest} tokens "
            f"more than the {spec.max_len} positions the model was made for. Lower it, or data.max_prompt_len."
        )
    for name, ids in (("stop_token_ids", rollout.stop_token_ids), ("banned_token_ids", rollout.banned_token_ids)):
        wrong = [i for i in ids or () if not 0 <= i < spec.vocab]
        if wrong:
            raise ValueError(
                f"rollout.{name}: got {wrong[0]}, and the model's tokens are 0 to {spec.vocab - 1}. Use the ids of "
                "its own tokenizer."
            )
    if config.model.router_coef and not spec.experts:
        raise ValueError(
            f"model.router_coef: got {config.model.router_coef}, and the model is no mixture of experts, so that there "
            "is no load to balance. Leave it out."
        )


def check_prompts(prompts: Sequence[PromptStream | PromptSet], model: Model, pool: RewardPool | None) -> None:
    """Refuse prompts that the model cannot read, and columns that the reward functions cannot get.

    Args:
        prompts: all that are sampled from.
        model: as it was loaded.
        pool: the reward functions, on the process that asks them.

    Raises:
        ValueError: a token or a column, by its row.
    """
    for each in prompts:
        for part in each.sets if isinstance(each, PromptStream) else (each,):
            part.check_tokens(model.spec.vocab)
            if pool is not None and pool.remote:
                part.check_columns_travel()
        if pool is not None:
            pool.check_columns(each.columns)


def memory(model: Model, config: TrainConfig, layout: Layout, prompt_len: int) -> dict[str, int]:
    """Bytes on one device by what holds them, activations left out.

    Args:
        model: with its mesh.
        config: of the run.
        layout: of its updates.
        prompt_len: tokens to which prompts are padded.
    """
    parameters, trained = (
        sum(_shard_bytes(x) for x in jax.tree.leaves(tree))
        for tree in (model.abstract_params, model.trained(model.abstract_params))
    )
    own_critic = config.algorithm.has_critic and not config.critic.shared_trunk
    follows = config.algorithm.reference_follow.every is not None
    saved = 3 * trained + parameters * (3 * own_critic + follows)
    wide = 1 if model.lora else np.dtype("float32").itemsize / np.dtype(model.param_dtype).itemsize
    narrow = np.dtype(model.dtype).itemsize / np.dtype(model.param_dtype).itemsize
    rows = config.rollout.prompts_per_step * config.rollout.num_samples
    shards = model.compute.mesh.shape["data"] * model.compute.mesh.shape["fsdp"]
    decodes = decoder(config.rollout, model)
    data, fsdp = (decodes.compute.mesh.shape[axis] for axis in ("data", "fsdp"))
    view = sum(_shard_bytes(x) for x in jax.tree.leaves(decodes.base.abstract_params)) * narrow * fsdp
    slots = min(rows, config.rollout.slots or rows)
    tokens = slots * config.rollout.max_new_tokens + config.rollout.prompts_per_step * prompt_len
    cache = tokens * token_bytes(decodes)
    return {
        "parameters": parameters,
        "optimizer": 2 * trained,
        "gradient": int(trained * wide),
        "reference": parameters if config.loss.kl_coef and model.lora is None else 0,
        "critic": 3 * parameters if own_critic else 0,
        "copy to save": saved if jax.default_backend() == "cpu" else 0,
        "decode view": int(view),
        "KV cache": min(cache, (config.rollout.kv_memory_mb or cache) * 2**20) // (data * fsdp),
        "batch": config.optim.minibatches * layout.row_counts[-1] * layout.row_len * 4 * 8 // shards,
    }


ALWAYS = ("parameters", "optimizer", "reference", "critic")
PHASES = {
    "sampling": ("decode view", "KV cache"),
    "training": ("gradient", "batch"),
    "saving": ("decode view", "copy to save"),
}
"""What a phase holds beside what is always there; none of it is there in another. An evaluation's view is still there
when its step is saved."""


def peak(parts: dict[str, int]) -> tuple[str, int]:
    """The phase that holds most, and how much, of what `memory` gives."""
    held = {phase: sum(parts[name] for name in (*ALWAYS, *beside)) for phase, beside in PHASES.items()}
    return max(held.items(), key=lambda item: item[1])


def room_for_cache(model: Model, config: TrainConfig, layout: Layout, prompt_len: int) -> int | None:
    """Bytes that keys and values may have on each device, beside all else that is there during a rollout.

    None where the device does not say how much memory it has.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return None
    beside = (*ALWAYS, "decode view")
    parts = memory(model, config, layout, prompt_len)
    return max(0, int(limit * CACHE_SHARE) - sum(parts[name] for name in beside))


def report(model: Model, config: TrainConfig, layout: Layout, prompt_len: int) -> str:
    """`memory`, and the shapes that will be compiled, for the terminal.

    Raises:
        ValueError: it does not fit in the memory the device says it has.
    """
    parts = memory(model, config, layout, prompt_len)
    room = room_for_cache(model, config, layout, prompt_len)
    if room is not None:  # completions for which there is none wait in a queue
        parts["KV cache"] = min(parts["KV cache"], room)
    phase, total = peak(parts)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    line = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    if limit is not None and total > limit:
        raise ValueError(
            f"the run needs {_size(total)} on each device while {phase}, before activations ({line}), and a device has "
            f"{_size(limit)}. Raise mesh.fsdp or mesh.tensor, or lower rollout.prompts_per_step or max_new_tokens."
        )
    rows = " or ".join(map(str, layout.row_counts))
    shapes = f"updates of {rows} rows of {layout.row_len} tokens, prompts of {prompt_len}"
    most = f"at most {_size(total)}, while {phase}"
    return f"memory on each device before activations: {most} ({line})\nshapes: {shapes}"


def _shard_bytes(x: Any) -> int:
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit in ("B", "KiB") else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # used from its sources
