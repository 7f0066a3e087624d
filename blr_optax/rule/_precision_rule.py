"""`PrecisionRule`: how the state of `scale_by_precision` is read.

theta  =  m + eps / sqrt(ess p)            q = N(m, 1 / (ess p)),  p per example
m_a    =  m + r g / p                      the adversary of bSAM, g the gradient at theta
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._random import standard_normal
from blr_optax.estimators._curvature import Curvature, PerExampleSquares, Sample
from blr_optax.families import MeanField, Normal
from blr_optax.rule._prior import prior_precision
from blr_optax.state._reader import Rule

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax.rule._precision import ScaleByPrecisionState


def _relative_step(before: Array, after: Array) -> Array:
    """The u >= -1 with after = before (1 + u + u^2 / 2), without cancellation for small u."""
    x = jnp.maximum((after - before) / before, -0.5)
    return 2.0 * x / (jnp.sqrt(1.0 + 2.0 * x) + 1.0)


@dataclasses.dataclass(frozen=True)
class PrecisionRule(Rule):
    """How a `ScaleByPrecisionState` is read.

    Attributes:
        kind: the curvature that a gradient gives.
        generator: of the noise; None for the delta method, whose weights are the mean.
        step: how the precision moves, see `scale_by_precision`.
        radius: r, of the adversary; None for no second gradient.
    """

    kind: Curvature
    generator: str | None
    step: str = "improved"
    radius: float | None = None

    @property
    def by_example(self) -> bool:
        return isinstance(self.kind, PerExampleSquares)

    @property
    def adversarial(self) -> bool:
        return self.radius is not None

    def part(self, state: ScaleByPrecisionState, params: Any) -> Any:
        return _tree.matching_leaves(params, state.precision, "params")

    def noise(self, state: ScaleByPrecisionState, key: Array) -> Any:
        if self.generator is None:
            return None
        return standard_normal(key, state.precision, self.generator)

    def weights(self, state: ScaleByPrecisionState, params: Any, noise: Any) -> Any:
        """theta = m + eps / sqrt(ess p), formed in float32 or wider, in the weights' own dtype."""
        if self.generator is None:
            return params

        def draw(p: Array, eps: Array, m: Array) -> Array:
            return (m.astype(p.dtype) + eps * jax.lax.rsqrt(state.ess.astype(p.dtype) * p)).astype(
                m.dtype
            )

        return jax.tree.map(draw, state.precision, noise, params)

    def curvature(self, state: ScaleByPrecisionState, params: Any, weights: Any, grads: Any) -> Any:
        """Per-example curvature from the displacement actually made, which matters in bfloat16."""

        def widen(p: Array, x: Array) -> Array:
            return x.astype(p.dtype)

        wide = [jax.tree.map(widen, state.precision, x) for x in (params, weights, grads)]
        displacement = jax.tree.map(jnp.subtract, wide[1], wide[0])
        total = jax.tree.map(lambda p: state.ess.astype(p.dtype) * p, state.precision)
        return self.kind.diagonal(
            Sample(None, wide[1], wide[2], displacement, total, state.ess, None)
        )

    def posterior(self, state: ScaleByPrecisionState, params: Any) -> Posterior:
        """N(params, 1 / (ess p))."""
        family = MeanField(Normal())
        total = jax.tree.map(lambda p: state.ess.astype(p.dtype) * p, state.precision)
        mean = jax.tree.map(lambda p, m: m.astype(p.dtype), state.precision, params)
        return Posterior(family, family.from_mean(mean, total))

    def corrections(
        self, before: Any, after: Any, b2: Any, curvature: Any, weight_decay: Any
    ) -> tuple[Array | None, Array | None]:
        """Shares of the second-order term in the move and in the precision."""
        if self.step in ("plain", "plain_old"):
            return jnp.zeros(()), None if b2 is None else jnp.zeros(())
        u = jax.tree.map(_relative_step, before.precision, after.precision)
        if curvature is not None and b2 is not None:
            given = _tree.matching_leaves(curvature, before.precision, "curvature")
            d0 = prior_precision(
                weight_decay, before.prior, before.ess, before.precision, before.count
            )
            u = jax.tree.map(
                lambda u, p, c, d: jnp.where((1.0 - b2) * (c + d - p) < -p, -2.0 - u, u),
                u, before.precision, given, d0,
            )  # fmt: skip
        first = _tree.total(lambda p, u: jnp.sum(p * jnp.abs(u)), before.precision, u)
        second = _tree.total(lambda p, u: jnp.sum(0.5 * p * u * u), before.precision, u)
        of_move = _tree.ratio(second, first + second)
        if b2 is None:
            return of_move, None
        return of_move, second / ((1.0 - b2) * _tree.total(jnp.sum, before.precision))

    def adversary(self, state: ScaleByPrecisionState, params: Any, grads: Any) -> Any:
        """m + r g / p: where the loss is worst within the posterior's reach, to first order."""
        return jax.tree.map(
            lambda p, m, g: (m.astype(p.dtype) + self.radius * g.astype(p.dtype) / p).astype(
                m.dtype
            ),
            state.precision, params, grads,
        )  # fmt: skip
