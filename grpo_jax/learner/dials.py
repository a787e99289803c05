"""Coefficients that move from step to step, on the host; their state is part of the checkpoint's record."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax import algo
from grpo_jax.config import TrainConfig
from grpo_jax.learner.step import Dials


class Controllers:
    """The adaptive KL coefficient (docs/MATH.md, section 4) and entropy bonus (section 5).

    What a config does not switch on is None in `dials`, so that the loss's own number is compiled in.
    """

    def __init__(self, config: TrainConfig):
        """Start at the loss's own coefficients."""
        self._kl, self._entropy = config.algorithm.adaptive_kl, config.algorithm.adaptive_entropy
        self.kl_coef = float(np.float32(config.loss.kl_coef))
        self._entropy_state = algo.EntropyController.start(config.loss.entropy_coef)

    @property
    def dials(self) -> Dials:
        """What the coming step uses."""
        kl_coef = None if self._kl.target is None else np.float32(self.kl_coef)
        entropy_coef = None if self._entropy.target is None else np.float32(self._entropy_state.effective)
        return Dials(kl_coef, entropy_coef)

    @property
    def figures(self) -> dict[str, float]:
        """The coefficients that move, by metric name."""
        moving = {"kl_coef": self.dials.kl_coef, "entropy_coef": self.dials.entropy_coef}
        return {name: float(value) for name, value in moving.items() if value is not None}

    def advance(self, figures: Mapping[str, float], completions: int) -> None:
        """Move on after a step, by its mean ``kl_per_sequence`` and ``entropy``; stay where that is not finite.

        An update whose numbers are not finite is skipped, and what it says of the policy steers nothing either.

        Args:
            figures: of the step.
            completions: sampled for it.
        """
        kl, entropy = self._kl, self._entropy
        if kl.target is not None and np.isfinite(figures["kl_per_sequence"]):
            coef = algo.adaptive_kl(
                self.kl_coef,
                figures["kl_per_sequence"],
                target=kl.target,
                horizon=kl.horizon,
                completions=completions,
            )
            self.kl_coef = min(float(coef), float(np.finfo(np.float32).max))
        if entropy.target is not None and np.isfinite(figures["entropy"]):
            self._entropy_state = algo.adaptive_entropy(
                self._entropy_state,
                figures["entropy"],
                target=entropy.target,
                delta=entropy.delta,
                low=entropy.low,
                high=entropy.high,
            )

    def state(self) -> dict[str, Any]:
        """JSON values only; a float32 survives the way through a JSON number unchanged."""
        entropy = self._entropy_state
        return {"kl_coef": self.kl_coef, "entropy": [float(entropy.coef), bool(entropy.active)]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.kl_coef = state["kl_coef"]
        coef, active = state["entropy"]
        self._entropy_state = algo.EntropyController(np.float32(coef), np.bool_(active))  # type: ignore[arg-type]
