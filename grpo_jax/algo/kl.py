"""Estimators of the KL to the reference policy, per token (MATH.md section 4).

Every estimator has the signature `f(x, ratio) -> kl`, with x = ref_logp - logp and ratio = pi / pi_old at the token, of
one shape. Values estimate KL(pi || ref); what a gradient estimates is another question, which each docstring answers
for tokens drawn from pi itself ("on-policy"). k1, k2, k3: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import LOG_RATIO_LIMIT, bound, fixed, magnitude


@jax.custom_jvp
def exp_above_tangent(x: Array) -> Array:
    """Return exp(x) - x - 1 with derivative expm1(x), where differentiating expm1 gives exp(x) - 1 and loses digits."""
    return jnp.expm1(x) - x


@exp_above_tangent.defjvp
def _exp_above_tangent_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return exp_above_tangent(x), jnp.expm1(x) * dx


def k1(x: Array, ratio: Array) -> Array:
    """-x. Unbiased. Its gradient is 0 in expectation: in the loss it does nothing but add noise."""
    return -x


def k2(x: Array, ratio: Array) -> Array:
    """x^2 / 2. Biased, low variance. Its gradient estimates that of KL(pi || ref)."""
    return jnp.square(x) / 2


def k3(x: Array, ratio: Array) -> Array:
    """exp(x) - x - 1. Unbiased, never negative. Its gradient estimates that of the forward KL(ref || pi).

    Written with expm1, which keeps small x; x is bounded above in both terms, so that far above the gradient is 0 and
    does not turn round.
    """
    return exp_above_tangent(bound(x, None, LOG_RATIO_LIMIT))


def absolute(x: Array, ratio: Array) -> Array:
    """|x|. Its gradient estimates that of the sum over tokens of |pi - ref|, twice the total variation."""
    return magnitude(x)


def k1_plus(x: Array, ratio: Array) -> Array:
    """Value of k1, gradient of k2: unbiased, and its gradient estimates that of KL(pi || ref)."""
    return _with_gradient_of_k2(k1(x, ratio), x, ratio)


def k3_plus(x: Array, ratio: Array) -> Array:
    """Value of k3, gradient of k2: unbiased, and its gradient estimates that of KL(pi || ref)."""
    return _with_gradient_of_k2(k3(x, ratio), x, ratio)


def k1_unbiased(x: Array, ratio: Array) -> Array:
    """k1 times the ratio: value and gradient estimate KL(pi || ref) for tokens drawn from pi_old too. 2512.02556."""
    return ratio * k1(x, ratio)


def k3_unbiased(x: Array, ratio: Array) -> Array:
    """k3 times the ratio: as k1_unbiased with less variance; on-policy its gradient is k2's, sample by sample."""
    return ratio * k3(x, ratio)


def _with_gradient_of_k2(value: Array, x: Array, ratio: Array) -> Array:
    carrier = k2(x, ratio)
    return fixed(value) + (carrier - fixed(carrier))


KL_ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "k1_plus": k1_plus,
    "k3_plus": k3_plus,
    "k1_unbiased": k1_unbiased,
    "k3_unbiased": k3_unbiased,
}
"""Estimators by name; the keys are those of `spec.KLEstimator`."""
