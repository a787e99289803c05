"""The rollout table of a config: what samples, in how many slots."""

from typing import get_args

import pytest

from grpo_jax.config import RolloutConfig
from grpo_jax.models.decode_attention import KV_DTYPES, READERS
from grpo_jax.rollout import engine_from, sampling_from
from grpo_jax.rollout.setup import slots_for, token_bytes
from grpo_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model()[0]


def slots(model, **fields):
    return engine_from(RolloutConfig(prompts_per_step=4, num_samples=8, **fields), model, 16, tiny_tokenizer()).slots


def test_slots_follow_rows_table_and_memory(model):
    assert slots(model) == 32 and slots(model, slots=12) == 12 and slots(model, slots=999) == 32
    layers = model.spec.layers
    assert token_bytes(model) == sum(8 * layer.kv_heads * layer.head_dim for layer in layers)
    fifth = 2**20 // token_bytes(model) // 5 - 16  # with its prompt a fifth of 1 MiB
    assert slots(model, max_new_tokens=fifth, kv_memory_mb=1) == 5
    assert slots(model, max_new_tokens=fifth, kv_memory_mb=1, slots=3) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cohort", "slots": 8}, "rollout.schedule: got cohort with 8 slots for 32 completions"),
        ({"attention": "pallas"}, "rollout.attention: got pallas on a cpu"),
        ({"kv_memory_mb": 1, "max_new_tokens": 10**6}, "rollout.kv_memory_mb: got 1"),
    ],
)
def test_refuses_what_does_not_fit(model, fields, message):
    with pytest.raises(ValueError, match=message):
        slots(model, **fields)


def test_the_schedule_is_the_tables(model):
    table = RolloutConfig(prompts_per_step=4, num_samples=8, schedule="refill")
    assert engine_from(table, model, 16, tiny_tokenizer()).shapes(4, 8, 64).refill
    table = RolloutConfig(prompts_per_step=4, num_samples=8)
    assert not engine_from(table, model, 16, tiny_tokenizer()).shapes(4, 8, 64).refill
    assert engine_from(table, model, 16, tiny_tokenizer()).shapes(5, 8, 64).refill


def test_how_keys_and_values_are_kept_and_read_is_the_tables(model):
    """Every legal value is the model's too; int8 keeps one scale a token and head beside its numbers."""
    fields = RolloutConfig.model_fields
    assert set(get_args(fields["attention"].annotation)) == {"auto", *READERS}
    assert get_args(fields["kv_dtype"].annotation) == KV_DTYPES
    table = RolloutConfig(prompts_per_step=4, num_samples=8, attention="dense", kv_dtype="int8", max_new_tokens=99)
    made = engine_from(table, model, 16, tiny_tokenizer()).model
    assert (made.attention, made.kv_dtype) == ("dense", "int8") and made.keeper.variant == "dense"
    layers = model.spec.layers
    assert token_bytes(made) == sum(2 * layer.kv_heads * (layer.head_dim + 4) for layer in layers)
    more, fewer = (slots(model, kv_memory_mb=1, max_new_tokens=999, kv_dtype=kept) for kept in ("int8", "auto"))
    assert more > 1.5 * fewer > 0


def test_every_sampling_field_arrives():
    table = RolloutConfig(
        max_new_tokens=9, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2,
        min_tokens=2, stop_strings=("a",), banned_token_ids=(4,),
    )  # fmt: skip
    made = sampling_from(table, {2, 1})
    assert (made.temperature, made.top_k, made.top_p, made.min_p, made.max_new_tokens) == (0.5, 3, 0.9, 0.1, 9)
    assert (made.repetition_penalty, made.presence_penalty, made.min_tokens) == (1.1, 0.2, 2)
    assert (made.stop_ids, made.stop_strings, made.banned_ids) == ((1, 2), ("a",), (4,))
    with pytest.raises(ValueError, match="rollout.min_tokens"):
        sampling_from(RolloutConfig(max_new_tokens=3, min_tokens=4), ())


def test_slots_follow_the_memory_that_is_left(model):
    table = RolloutConfig(prompts_per_step=4, num_samples=8, max_new_tokens=48)
    one = (16 + 48) * token_bytes(model)
    assert slots_for(table, model, 16, None) == 32
    assert slots_for(table, model, 16, 7 * one + 1) == 7 and slots_for(table, model, 16, 10**9) == 32
    assert slots_for(table.model_copy(update={"kv_memory_mb": 1}), model, 16, 3 * one) == min(32, 2**20 // one)
    with pytest.raises(ValueError, match="rollout.kv_memory_mb: got none, and the devices have"):
        slots_for(table, model, 16, one - 1)
    with pytest.raises(ValueError, match="rollout.schedule: got cohort with 7 slots"):
        slots_for(table.model_copy(update={"schedule": "cohort"}), model, 16, 7 * one)
