"""Rotary position embedding: frequencies of each kind, and the turn of queries and keys."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.rotary_spec import RotarySpec

Rotation = tuple[jax.Array, jax.Array]
"""cos and sin, each [..., R / 2] float32, of the R features that are turned."""


def inverse_frequencies(rotary: RotarySpec, head_dim: int, longest: int = 0) -> np.ndarray:
    """[R / 2] float32, in float32 arithmetic as the models were trained.

    Args:
        rotary: its kind and numbers.
        head_dim: features of a head, of which R are turned.
        longest: of the run's texts, for the kinds whose frequencies depend on it.
    """
    return FREQUENCIES[rotary.kind](rotary, rotary.rotated(head_dim), longest).astype(np.float32)


def _powers(theta: float, size: int) -> np.ndarray:
    return np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))


def _default(rotary: RotarySpec, size: int, longest: int) -> np.ndarray:
    """Su et al. 2021."""
    return np.float32(1) / _powers(rotary.theta, size)


def _linear(rotary: RotarySpec, size: int, longest: int) -> np.ndarray:
    """Chen et al. 2023: positions divided by the factor."""
    return _default(rotary, size, longest) / np.float32(rotary.factor)


def _dynamic(rotary: RotarySpec, size: int, longest: int) -> np.ndarray:
    """The base grows with the text, once it is longer than the model was trained for."""
    stretch = rotary.factor * max(longest, rotary.original_len) / rotary.original_len - (rotary.factor - 1)
    return np.float32(1) / _powers(rotary.theta * stretch ** (size / (size - 2)), size)


def _llama3(rotary: RotarySpec, size: int, longest: int) -> np.ndarray:
    """Slowed by the factor below a number of turns, not at all above another, smoothly in between."""
    plain = _default(rotary, size, longest)
    turns = np.float32(rotary.original_len) * plain / np.float32(2 * math.pi)
    low, high = np.float32(rotary.low_freq_factor), np.float32(rotary.high_freq_factor)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return share * plain + (1 - share) * plain / np.float32(rotary.factor)


def _yarn(rotary: RotarySpec, size: int, longest: int) -> np.ndarray:
    """Peng et al. 2023: like llama3, but the ramp is over the features' numbers."""

    def feature(turns: float) -> float:  # the pair of features that turns so often over the original length
        return size * math.log(rotary.original_len / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = feature(rotary.beta_fast), feature(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001
    slowed = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    powers = _powers(rotary.theta, size)
    return 1 / (np.float32(rotary.factor) * powers) * slowed + 1 / powers * (1 - slowed)


def _longrope(rotary: RotarySpec, size: int, longest: int) -> np.ndarray:
    """Ding et al. 2024: a divisor for each frequency, one list up to the original length and one beyond."""
    factors = rotary.long_factors if longest > rotary.original_len else rotary.short_factors
    return np.float32(1) / (np.array(factors, np.float32) * _powers(rotary.theta, size))


FREQUENCIES: Mapping[str, Callable[[RotarySpec, int, int], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""kind -> inverse frequencies."""


def rotation(rotary: RotarySpec, head_dim: int, positions: jax.Array, longest: int = 0) -> Rotation:
    """[...] int32 -> cos, sin [..., R / 2]."""
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(rotary, head_dim, longest)
    return jnp.cos(angle) * rotary.attention, jnp.sin(angle) * rotary.attention


def rotate(x: jax.Array, turn: Rotation | None, scale: float = 1.0) -> jax.Array:
    """[..., heads axes, d] -> the same, float32, times ``scale``: of the R features that are turned, the first half
    is paired with the second; the others, or all where ``turn`` is None, pass.
    """  # noqa: D205
    x = x.astype(jnp.float32)
    if turn is None:
        return x * scale
    shape = turn[0].shape[:-1] + (1,) * (x.ndim - turn[0].ndim) + turn[0].shape[-1:]
    cos, sin = (part.reshape(shape) * scale for part in turn)
    half = turn[0].shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned + ([rest * scale] if rest.shape[-1] else []), axis=-1)
