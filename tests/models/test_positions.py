"""Frequencies of rotaries and windows of attention by numbers that are known, without a model."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import config

from grpo_jax.models import Model, ModelSpec
from grpo_jax.models.attention import window_mask
from grpo_jax.models.rotary import inverse_frequencies
from grpo_jax.models.rotary_spec import RotarySpec
from grpo_jax.models.tensors import list_tensors


@pytest.mark.parametrize(("longest", "divisor"), [(0, 1.0), (16, 1.0), (17, 2.0)])
def test_longrope_takes_its_long_list_beyond_the_original_length(longest, divisor):
    rotary = RotarySpec("longrope", original_len=16, short_factors=(1.0,), long_factors=(2.0,))
    assert inverse_frequencies(rotary, 2, longest).tolist() == [1 / divisor]


def test_llama3_slows_what_turns_seldom_and_nothing_that_turns_often():
    rotary = RotarySpec("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192)
    plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
    slowed = inverse_frequencies(rotary, 128) / plain
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(slowed[turns > 4], 1, rtol=1e-5)
    np.testing.assert_allclose(slowed[turns < 1], 1 / 8, rtol=1e-5)
    assert (np.diff(slowed) <= 1e-6).all() and (turns > 4).any() and (turns < 1).any()


def test_a_token_sees_the_last_of_its_window_itself_included():
    positions = jnp.array([[0, 1, 2, 3, 2]])  # by positions, wherever the columns lie
    seen = window_mask(jnp.ones((1, 2, 5), bool), positions, 2)
    assert seen.tolist() == [[[False, False, True, True, True], [False, True, True, True, True]]]


def test_parts_of_a_joined_tensor_lie_in_their_order():
    """Queries first, which are of more heads than keys and values: neither by their paths nor of one size."""
    model = Model(ModelSpec.from_hf(config("phi3", num_attention_heads=4, num_key_value_heads=2)))
    joined = next(t for t in list_tensors(model) if t.name.endswith("0.self_attn.qkv_proj.weight"))
    width = joined.shape[0] // 8
    assert [(entry.part, entry.shape[0]) for _, entry in joined.parts] == [
        (0, 4 * width),
        (1, 2 * width),
        (2, 2 * width),
    ]
