"""The habits every formula of algo/ shares: the float type, the mask, what is near a tie, the clamp, |x|."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before exp (DESIGN.md, contract 11)."""

SLACK = 1e-5
"""A bound acts from this far beyond it, or this share of it: more than two programs of the learner differ by."""
FLAT, STEEP = 1e-4, 1e-3
"""|x| has slope 0 up to the first, and its own from the second on."""
ENTROPY_GRID = 2.0**-12
"""What entropies are rounded to, in nat, before they are compared."""
COMPARED_BITS = 10
"""Bits of the fraction that are left of a number before it is ranked."""


def as_float(x: chex.ArrayTree) -> Array:
    """Return `x` as float32, or as float64 if it is that already."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def keep(mask: Array, x: Array) -> Array:
    """Return `x` where `mask`, else 0, by selection: a product would turn a masked NaN into a NaN."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def below(x: Array, low: float | Array | None) -> Array:
    """Return whether `x` is below a bound by more than rounding can make it; nowhere for None."""
    return jnp.zeros(x.shape, bool) if low is None else x < low - _slack(low)


def above(x: Array, high: float | Array | None) -> Array:
    """Return whether `x` is above a bound by more than rounding can make it; nowhere for None."""
    return jnp.zeros(x.shape, bool) if high is None else x > high + _slack(high)


def bound(x: Array, low: float | Array | None, high: float | Array | None) -> Array:
    """Clip `x` to [low, high], None for no bound; at a tie, or nearly, value and gradient are those of `x`."""
    if low is not None:
        x = jnp.where(below(x, low), jnp.asarray(low, x.dtype), x)
    if high is not None:
        x = jnp.where(above(x, high), jnp.asarray(high, x.dtype), x)
    return x


def coarse(x: Array) -> Array:
    """Return `x` with `COMPARED_BITS` of its fraction: what two programs round otherwise is then one number."""
    return jax.lax.reduce_precision(x, exponent_bits=11 if x.dtype == jnp.float64 else 8, mantissa_bits=COMPARED_BITS)


def clamp_log(x: Array) -> Array:
    """Clamp a log-ratio to plus and minus `LOG_RATIO_LIMIT`, with gradient 0 where the clamp acts."""
    return bound(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@jax.custom_jvp
def magnitude(x: Array) -> Array:
    """Return |x|; its gradient rises from 0 at `FLAT` to sign(x) at `STEEP`, so that noise around 0 has none."""
    return jnp.abs(x)


@magnitude.defjvp
def _magnitude_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    slope = jnp.sign(x) * jnp.clip((jnp.abs(x) - FLAT) / (STEEP - FLAT), 0, 1)
    return magnitude(x), slope.astype(x.dtype) * dx


def root(x: Array) -> Array:
    """Return the square root of x >= 0 with gradient 0 at 0, where jnp.sqrt has infinity."""
    positive = x > 0
    return keep(positive, jnp.sqrt(jnp.where(positive, x, 1)))


def _slack(limit: float | Array) -> float | Array:
    return SLACK * (max(1.0, abs(limit)) if isinstance(limit, float | int) else jnp.maximum(1.0, jnp.abs(limit)))


def fixed(x: Array) -> Array:
    """Return `x` without its gradient; the formulas' sg."""
    return jax.lax.stop_gradient(x)
