"""Mixtures of Gaussians, learnt through the joint density of component and point.

    q(theta) = sum_k pi_k N(theta; m_k, S_k^{-1})
    lambda = {S_k m_k, -S_k / 2 for all k}, {log(pi_k / pi_K) for k < K}

With f = E + log q and q_k the k-th component the natural gradient of E_q[E] - H(q) is

    component k:    (E_k[grad f] - H_k m_k, H_k / 2),   H_k = E_k[hess f]
    log(pi_k / pi_K):   E_k[f] - E_K[f]

in the metric of the joint q(k, theta), whose Fisher matrix is block-diagonal and invertible where
the mixture's own need not be. No pi_k remains in it (Lin, Khan and Schmidt 2019; Khan and Rue 2023,
Sec. 3.2: at the means, with `delta()`, it is their multimodal optimizer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax.families._base.conditional import (
    ConditionalFamily,
    hessian_diagonal,
    move_gaussian,
    normals,
)
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.registry import get
from blr_optax.families._base.standard_parameters import (
    DEFINITE,
    DISTRIBUTION,
    POSITIVE,
    REAL,
    Parameter,
    checked,
)
from blr_optax.families._continuous.gaussian import (
    Gaussian,
    GaussianFamily,
    GaussianNatural,
    Normal,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import Alternative, Scalar
    from blr_optax.families._base.family import Family

GAUSSIAN = Gaussian()


@parameters
class MixtureNatural(NamedTuple):
    """lambda of a mixture: its components' [..., K, ...], and log(pi_k / pi_K) for k < K."""

    components: GaussianNatural
    log_odds: Array


@dataclasses.dataclass(frozen=True)
class Mixture(ConditionalFamily):
    """A mixture of Gaussians over vectors; the number of components is that of the weights.

    log q(theta) = log sum_k pi_k N(theta; m_k, S_k^{-1}).

    Standard parameters: `weights` [..., K], `mean` [..., K, d], and `covariance` or `precision`
    [..., K, d, d]; for diagonal components `variance` or `precision` [..., K, d].
    Samples carry gradients in the components, not in the weights.

    lambda: components = lambda of all Gaussians [..., K, ...], log_odds = log(pi_k / pi_K)
    [..., K - 1]. There is no mu.

    Attributes:
        family: "gaussian", or "normal" for diagonal components, or the family itself.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> mixture = blr.families.get("mixture")
      >>> lam = mixture.natural(
      ...     weights=jnp.array([0.5, 0.5]),
      ...     mean=jnp.array([[-1.0], [3.0]]),
      ...     covariance=jnp.ones((2, 1, 1)),
      ... )
      >>> print(mixture.mean(lam), mixture.variance(lam))
      [1.] [5.]
      >>> two_wells = lambda x: 10.0 * jnp.sum((x**2 - 4.0) ** 2)
      >>> estimate = blr.estimators.natural_gradient(mixture, two_wells, blr.estimators.delta())
      >>> step = jax.jit(lambda lam: mixture.move(lam, estimate(None, lam)[1], 0.5))
      >>> for _ in range(50):
      ...     lam = step(lam)
      >>> print(mixture.standard(lam)["mean"][:, 0].round(2))
      [-2.  2.]
    """

    family: GaussianFamily = GAUSSIAN

    Natural: ClassVar[type] = MixtureNatural
    at_means: ClassVar[bool] = True
    shares_draws: ClassVar[bool] = True

    def __init__(self, family: Family | str = GAUSSIAN) -> None:
        """Look a name up."""
        object.__setattr__(self, "family", get(family))
        if not isinstance(self.family, Gaussian | Normal):
            raise ValueError(
                f"Mixture: family={self.family!r} must be Gaussian() or Normal() (diagonal)."
            )

    @property
    def _diagonal(self) -> bool:
        return self.family.curvature == "diagonal"

    def _spread(self, name: str) -> Parameter:
        """Return what the variances, covariances or precisions of the components must be."""
        if name == ("covariance" if self._diagonal else "variance"):
            kind, other = ("diagonal", "variance") if self._diagonal else ("full", "covariance")
            way = "" if self._diagonal else ", or get('mixture', family='normal')"
            raise ValueError(
                f"mixture.natural: the components are {kind} Gaussians, which have no {name}: "
                f"give {other} or precision{way}."
            )
        return POSITIVE.over("K d") if self._diagonal else DEFINITE.over("K d d")

    @checked(
        weights=DISTRIBUTION,
        mean=REAL.over("K d"),
        covariance=lambda self: self._spread("covariance"),
        variance=lambda self: self._spread("variance"),
        precision=lambda self: self._spread("precision"),
    )
    def natural(
        self,
        *,
        weights: ArrayLike,
        mean: ArrayLike,
        variance: Alternative = None,
        covariance: Alternative = None,
        precision: Alternative = None,
    ) -> MixtureNatural:
        """lambda from weights (positive, of sum one), means, and covariances or precisions."""
        spread = {"variance": variance} if self._diagonal else {"covariance": covariance}
        log_weights = jnp.log(weights)
        return MixtureNatural(
            self.family.natural(mean=mean, precision=precision, **spread),
            log_weights[..., :-1] - log_weights[..., -1:],
        )

    def log_weights(self, lam: MixtureNatural) -> Float[Array, "... K"]:
        """log pi_k."""
        zero = jnp.zeros((*lam.log_odds.shape[:-1], 1), lam.log_odds.dtype)
        return jax.nn.log_softmax(jnp.concatenate([lam.log_odds, zero], axis=-1))

    def standard(self, lam: MixtureNatural) -> dict[str, Array]:
        return {"weights": jnp.exp(self.log_weights(lam)), **self.family.standard(lam.components)}

    def component_log_prob(self, lam: MixtureNatural, theta: Array) -> Float[Array, "... K"]:
        """log N(theta; m_k, S_k^{-1}) for every k."""
        found = self.family.log_prob(lam.components, theta[..., None, :])
        return jnp.sum(found, axis=-1) if self._diagonal else found

    def log_prob(self, lam: MixtureNatural, theta: Array) -> Array:
        return jax.nn.logsumexp(
            self.log_weights(lam) + self.component_log_prob(lam, theta), axis=-1
        )

    def responsibilities(self, lam: MixtureNatural, theta: Array) -> Float[Array, "... K"]:
        """q(k | theta)."""
        return jax.nn.softmax(self.log_weights(lam) + self.component_log_prob(lam, theta))

    def sample(self, key: Array, lam: MixtureNatural, shape: tuple[int, ...] = ()) -> Array:
        which, draw = jax.random.split(key)
        log_weights = self.log_weights(lam)
        index = jax.random.categorical(which, log_weights, shape=shape + log_weights.shape[:-1])
        theta = self.family.sample(draw, lam.components, shape)
        return jnp.take_along_axis(theta, index[..., None, None], axis=-2)[..., 0, :]

    def cdf(self, lam: MixtureNatural, theta: Array) -> Array:
        weights = jnp.exp(self.log_weights(lam))[..., None]
        return jnp.sum(weights * self.family.cdf(lam.components, theta[..., None, :]), axis=-2)

    def mean(self, lam: MixtureNatural) -> Array:
        weights = jnp.exp(self.log_weights(lam))[..., None]
        return jnp.sum(weights * self.family.mean(lam.components), axis=-2)

    def variance(self, lam: MixtureNatural) -> Array:
        weights = jnp.exp(self.log_weights(lam))[..., None]
        away = self.family.mean(lam.components) - self.mean(lam)[..., None, :]
        return jnp.sum(weights * (self.family.variance(lam.components) + away * away), axis=-2)

    def in_domain(self, lam: MixtureNatural) -> Bool[Array, ...]:
        inside = self.family.in_domain(lam.components)
        inside = jnp.all(inside, axis=-1) if self._diagonal else inside
        return jnp.all(inside, axis=-1) & jnp.all(jnp.isfinite(lam.log_odds), axis=-1)

    def noise(
        self, key: Array, lam: MixtureNatural, samples: int, antithetic: bool = False
    ) -> Float[Array, "samples K d"]:
        like = lam.components.linear
        return normals(key, (samples, *like.shape), like.dtype, antithetic)

    def natural_gradient_at(
        self,
        lam: MixtureNatural,
        loss: Callable,
        noise: Float[Array, "samples K d"],
        weights: Float[Array, " samples"],
        curvature: str = "exact",
    ) -> tuple[Array, MixtureNatural]:
        theta = self.family.mean(lam.components) + self.family.displace(lam.components, noise)
        count = noise.shape[1]
        # Every component averages over its own draws only.
        share = jnp.kron(jnp.eye(count, dtype=theta.dtype), weights.astype(theta.dtype))
        theta = jnp.swapaxes(theta, 0, 1).reshape(-1, theta.shape[-1])
        return self._gradient(lam, loss, theta, share, curvature)

    def natural_gradient_from(
        self,
        lam: MixtureNatural,
        loss: Callable,
        theta: Float[Array, "samples d"],
        curvature: str = "exact",
    ) -> tuple[Array, MixtureNatural]:
        """`natural_gradient_at` from draws of the mixture itself, however they came about.

        Each draw counts for component k with N_k(theta) / q(theta): unbiased, at a variance that
        grows like 1 / pi_k.
        """
        relative = self.component_log_prob(lam, theta) - self.log_prob(lam, theta)[..., None]
        return self._gradient(lam, loss, theta, jnp.exp(relative).T / theta.shape[0], curvature)

    def _gradient(
        self,
        lam: MixtureNatural,
        loss: Callable,
        theta: Float[Array, "N d"],
        share: Float[Array, "K N"],
        curvature: str,
    ) -> tuple[Array, MixtureNatural]:
        """From points and what each counts for each component: E_k[f] ~ sum_n share[k, n] f_n."""
        second = hessian_diagonal if self._diagonal else lambda f, x: jax.hessian(f)(x)
        exact = curvature == "exact"

        def look(x: Array) -> tuple[Array, ...]:
            log_q = lambda x: self.log_prob(lam, x)  # noqa: E731
            bent = (lambda x: loss(x) + log_q(x)) if exact else log_q
            return (
                *jax.value_and_grad(loss)(x),
                *jax.value_and_grad(log_q)(x),
                second(bent, x),
            )

        value, slope, log_q, slope_q, h = jax.vmap(look)(theta)
        h = jnp.tensordot(share, h, 1)
        if not exact:
            s = self.family.precision(lam.components)
            away = theta - self.family.mean(lam.components)[:, None]
            if self._diagonal:
                h += jnp.einsum("kn,kd,knd,nd->kd", share, s, away, slope)
            else:
                first = jnp.einsum("kn,kde,kne,nf->kdf", share, s, away, slope)
                h += 0.5 * (first + jnp.swapaxes(first, -1, -2))
        f = share @ (value + log_q)
        components = self.family.gradient(lam.components, share @ (slope + slope_q), h)
        expected = jnp.exp(self.log_weights(lam)) @ (share @ value)
        return expected, MixtureNatural(components, f[:-1] - f[-1:])

    def move(
        self,
        lam: MixtureNatural,
        gradient: MixtureNatural,
        learning_rate: Scalar,
        step: str = "auto",
        *,
        weight_learning_rate: Scalar | None = None,
    ) -> MixtureNatural:
        """lambda - rho * gradient to first order; see `ConditionalFamily.move`.

        Args:
            lam: natural parameters.
            gradient: from `natural_gradient_at`.
            learning_rate: rho.
            step: how each precision moves.
            weight_learning_rate: rho of the weights, the same by default; smaller is common.
        """
        d = jax.tree.map(lambda g: -learning_rate * g, gradient.components)
        rate = learning_rate if weight_learning_rate is None else weight_learning_rate
        return MixtureNatural(
            move_gaussian(self.family, lam.components, d, step),
            lam.log_odds - rate * gradient.log_odds,
        )
