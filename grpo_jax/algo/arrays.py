"""The four habits every formula of algo/ shares: the float type, the mask, the clamp and the absolute value."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before exp (DESIGN.md, contract 11)."""


def as_float(x: chex.ArrayTree) -> Array:
    """Return `x` as float32, or as float64 if it is that already."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def keep(mask: Array, x: Array) -> Array:
    """Return `x` where `mask`, else 0, by selection: a product would turn a masked NaN into a NaN."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def bound(x: Array, low: float | Array | None, high: float | Array | None) -> Array:
    """Clip `x` to [low, high], None for no bound; at an exact tie the gradient is that of `x`."""
    if low is not None:
        x = jnp.where(x < low, jnp.asarray(low, x.dtype), x)
    if high is not None:
        x = jnp.where(x > high, jnp.asarray(high, x.dtype), x)
    return x


def clamp_log(x: Array) -> Array:
    """Clamp a log-ratio to plus and minus `LOG_RATIO_LIMIT`, with gradient 0 where the clamp acts."""
    return bound(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def magnitude(x: Array) -> Array:
    """Return |x| with gradient 0 at 0, where jnp.abs has 1."""
    return x * jnp.sign(x)


def root(x: Array) -> Array:
    """Return the square root of x >= 0 with gradient 0 at 0, where jnp.sqrt has infinity."""
    positive = x > 0
    return keep(positive, jnp.sqrt(jnp.where(positive, x, 1)))


def fixed(x: Array) -> Array:
    """Return `x` without its gradient; the formulas' sg."""
    return jax.lax.stop_gradient(x)
