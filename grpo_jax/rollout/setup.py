"""A run's ``rollout`` table -> what samples, and how."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax

from grpo_jax.config import RolloutConfig
from grpo_jax.mesh import recut
from grpo_jax.models.model import Model
from grpo_jax.rollout.engine import ContinuousEngine
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.slots import row_shards


def sampling_from(config: RolloutConfig, stop_ids: Iterable[int]) -> Sampling:
    """What a run draws from; ``stop_ids`` end a completion.

    Raises:
        ValueError: fields that do not go together.
    """
    try:
        return Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            stop_ids=tuple(sorted(set(stop_ids))),
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            presence_penalty=config.presence_penalty,
            min_tokens=config.min_tokens,
            stop_strings=config.stop_strings,
            banned_ids=config.banned_token_ids,
        )
    except ValueError as error:
        raise ValueError(f"rollout.{error}") from error


def engine_from(
    config: RolloutConfig, model: Model, prompt_len: int, tokenizer: Any, slots: int | None = None
) -> ContinuousEngine:
    """The engine of a run, its shapes compiled beside the first completions.

    Args:
        config: its table.
        model: what samples; the table says how it keeps and reads keys and values.
        prompt_len: tokens to which prompts are padded.
        tokenizer: reads completions where there are stop strings.
        slots: as decided before; None: `slots_for` what the table says alone.

    Raises:
        ValueError: a memory that holds no completion, slots too few for the schedule, or a layout that does not
            divide the devices.
    """
    slots = slots_for(config, model, prompt_len, None) if slots is None else slots
    # Evaluation may ask for more rows than a step has; those wait in a queue whatever the schedule.
    refill = True if config.schedule == "refill" else None
    return ContinuousEngine(decoder(config, model), prompt_len, slots, refill, tokenizer.decode, ahead=True)


def slots_for(config: RolloutConfig, model: Model, prompt_len: int, room: int | None) -> int:
    """Rows that decode at once: a step's all, or those that the table or the memory for keys and values allows.

    Args:
        config: the table.
        model: what samples.
        prompt_len: tokens to which prompts are padded.
        room: bytes for keys and values on each device where the table does not say; None is no limit.

    Raises:
        ValueError: a memory that holds no completion, or slots too few for the schedule.
    """
    rows = config.prompts_per_step * config.num_samples
    slots = min(config.slots or rows, rows)
    model = decoder(config, model)
    memory = None if room is None else room * row_shards(model)
    memory = memory if config.kv_memory_mb is None else config.kv_memory_mb * 2**20
    if memory is not None:
        one = (prompt_len + config.max_new_tokens) * token_bytes(model)
        slots = min(slots, memory // one)
        if slots < 1:
            got = config.kv_memory_mb or f"none, and the devices have {memory / 2**20:.1f} MiB left"
            raise ValueError(
                f"rollout.kv_memory_mb: got {got}, and the longest completion with its prompt needs "
                f"{one / 2**20:.1f} MiB. Raise it, or lower rollout.max_new_tokens."
            )
    if config.schedule == "cohort" and slots < rows:
        raise ValueError(
            f"rollout.schedule: got cohort with {slots} slots for {rows} completions, which cannot start together. "
            "Use refill or auto, or raise rollout.slots and rollout.kv_memory_mb."
        )
    return slots


def decoder(config: RolloutConfig, model: Model) -> Model:
    """``model`` as it decodes: how it keeps and reads keys and values, and the same devices cut by ``layout``.

    Raises:
        ValueError: a layout that does not divide the devices, or a kernel that is not for them.
    """
    platform = model.compute.mesh.devices.flat[0].platform
    if config.attention == "pallas" and platform != "gpu":
        raise ValueError(f"rollout.attention: got pallas on a {platform}, and the kernel is for GPUs. Use auto.")
    model = replace(model, attention=config.attention, kv_dtype=config.kv_dtype)
    if config.layout == "train":
        return model
    whole, mesh = config.layout == "replicated", model.compute.mesh
    tensor, expert = (1, 1) if whole else (int(config.layout.removeprefix("tensor=")), mesh.shape["expert"])
    try:
        return replace(model, mesh=recut(mesh, tensor, expert))
    except ValueError as error:
        raise ValueError(f"rollout.layout: {error}") from error


def token_bytes(model: Model) -> int:
    """Bytes of one token's keys and values in all layers."""
    column = jax.eval_shape(lambda: model.init_cache(1, 1))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(column))
