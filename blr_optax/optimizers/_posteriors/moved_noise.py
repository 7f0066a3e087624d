"""Weights that are a fixed noise moved by a group: the posteriors of the Lie-group rules.

    n = Q(z),  z standard normal           a law of noise, by the function that makes it of a normal
    theta = m + s n                        `LocationScale`, the additive and the affine group
    theta = g+ n+ - g- n-                  `SignedScale`, the multiplicative group on signed weights

Every law on the line is such a Q (its quantile function after the normal's distribution function),
so recorded normals, mirrored pairs (z, -z) and both generators serve all laws. But for the normal
law these are no exponential families: they draw, have moments, and densities where there is a
closed form, and have no arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _tree
from blr_optax._validate import unwritten
from blr_optax.families._base.family import Family
from blr_optax.families._base.parameters import parameters

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from blr_optax._typing import NaturalParameters, PyTree

LOG_NORMAL_SCALE = 0.5


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of noise on the line.

    Attributes:
        name: for errors.
        of_normal: Q, elementwise.
        mean: E[n].
        variance: Var[n].
        log_density: of n, where there is a closed form.
        entropy: of n, likewise.
    """

    name: str
    of_normal: Callable[[Array], Array]
    mean: float
    variance: float
    log_density: Callable[[Array], Array] | None = None
    entropy: float | None = None

    @property
    def square(self) -> float:
        """E[n^2]."""
        return self.variance + self.mean**2

    @property
    def deviation(self) -> float:
        """Standard deviation of n."""
        return self.variance**0.5


def _laplace(z: Array) -> Array:
    return -jnp.sign(z) * (jax.scipy.special.log_ndtr(-jnp.abs(z)) + np.log(2.0))


def _uniform(z: Array) -> Array:
    return jax.lax.erf(z * np.sqrt(0.5))


def _laplace_density(n: Array) -> Array:
    return -jnp.abs(n) - np.log(2.0)


def _uniform_density(n: Array) -> Array:
    return jnp.where(jnp.abs(n) <= 1.0, -np.log(2.0), -jnp.inf)


def _rayleigh(z: Array) -> Array:
    return jnp.sqrt(-2.0 * jax.scipy.special.log_ndtr(-z))


def _log_normal(z: Array) -> Array:
    return jnp.exp(LOG_NORMAL_SCALE * z)


def _normal(z: Array) -> Array:
    return z


_SPREAD = float(np.exp(LOG_NORMAL_SCALE**2))
SYMMETRIC = {
    "gaussian": Law("gaussian", _normal, 0.0, 1.0),
    "laplace": Law("laplace", _laplace, 0.0, 2.0, _laplace_density, 1.0 + float(np.log(2.0))),
    "uniform": Law("uniform", _uniform, 0.0, 1.0 / 3.0, _uniform_density, float(np.log(2.0))),
}
POSITIVE = {
    "rayleigh": Law("rayleigh", _rayleigh, float(np.sqrt(np.pi / 2.0)), 2.0 - np.pi / 2.0),
    "log_normal": Law("log_normal", _log_normal, _SPREAD**0.5, _SPREAD * (_SPREAD - 1.0)),
}


def _moments(of_normal: Callable[[Array], Array]) -> tuple[float, float, float]:
    """Mean, variance and smallest value of Q(z), by trapezes in z: spectral for smooth laws."""
    z = np.linspace(-8.0, 8.0, 3201)
    weight = np.exp(-0.5 * z * z)
    weight /= weight.sum()
    with jax.ensure_compile_time_eval():
        n = np.asarray(of_normal(jnp.asarray(z)), np.float64)
    if n.shape != z.shape:
        raise ValueError(f"noise: the function must be elementwise; it made {n.shape} of {z.shape}")
    mean = float(weight @ n)
    return mean, float(weight @ (n - mean) ** 2), float(n.min())


def as_law(noise: str | Callable[[Array], Array], *, positive: bool = False) -> Law:
    """Return the law of a name or of a function of standard normals.

    Raises:
        ValueError: for an unknown name, or a function whose law is not of mean zero (positive).
    """
    known = POSITIVE if positive else SYMMETRIC
    if not callable(noise):
        if noise not in known:
            raise ValueError(
                f"noise={noise!r} is unknown; known: {', '.join(known)}, or a function that makes "
                "draws of standard normals."
            )
        return known[noise]
    mean, variance, least = _moments(noise)
    if not (np.isfinite(variance) and variance > 0):
        raise ValueError(f"noise: the function makes draws of variance {variance}; it must spread.")
    if positive and least < 0:
        raise ValueError(
            f"noise: multiplicative noise must be positive; the function returned {least:.3g}."
        )
    if not positive:
        if abs(mean) > 1e-3 * variance**0.5:
            raise ValueError(
                f"noise: the function's mean is {mean:.3g}, but the parameters are the posterior's "
                "mean; subtract it."
            )
        mean = 0.0
    return Law(getattr(noise, "__name__", "noise"), noise, mean, variance)


@parameters
class LocationScaleNatural(NamedTuple):
    """Location m and scale s, trees like theta."""

    location: PyTree
    scale: PyTree


@parameters
class SignedScaleNatural(NamedTuple):
    """The gains g+ and g-, trees like theta."""

    plus: PyTree
    minus: PyTree


@dataclasses.dataclass(frozen=True)
class Moved(Family):
    """Base: independent weights, each a law's noise moved by a group.

    Attributes:
        law: of the noise.
    """

    law: Law

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> PyTree:
        """Draws of theta with leading `shape`."""

        def leaf(path: Any, *fields: Array) -> Array:
            # One normal per field that is a scale: g+ and g- have their own.
            size = (self.draws, *shape, *jnp.shape(fields[0]))
            own = jax.random.fold_in(key, _tree.path_hash(path))
            z = jax.random.normal(own, size, jnp.result_type(fields[0]))
            return self.moved(self.law.of_normal(z), *fields)

        return jax.tree_util.tree_map_with_path(leaf, *lam)

    def join(
        self, lam: NaturalParameters, other: Family, other_lam: NaturalParameters
    ) -> tuple[Family, PyTree] | None:
        """With one of the same law and group: over the leaves of both."""
        if other != self:
            return None
        return self, self.Natural(*map(_tree.fill, lam, other_lam))

    draws: ClassVar[int]

    def moved(self, n: Array, *fields: Any) -> Array:
        """Return theta of noise with a leading axis of `draws`."""
        raise unwritten(self, "moved(self, n, *fields)")

    def _positive(self, *trees: Any) -> Bool[Array, ""]:
        leaves = jax.tree.leaves(trees)
        return jnp.all(jnp.array([jnp.all((x > 0) & jnp.isfinite(x)) for x in leaves]))


class LocationScale(Moved):
    """theta = location + scale n, every weight its own; `law` has mean zero."""

    Natural: ClassVar[type] = LocationScaleNatural
    draws: ClassVar[int] = 1

    def natural(self, *, location: PyTree, scale: PyTree) -> LocationScaleNatural:
        """From trees like theta."""
        return LocationScaleNatural(location, scale)

    def standard(self, lam: LocationScaleNatural) -> dict[str, PyTree]:
        return {"location": lam.location, "scale": lam.scale}

    def moved(self, n: Array, m: Array, s: Array) -> Array:
        return m + s * n[0]

    def mean(self, lam: LocationScaleNatural) -> PyTree:
        return lam.location

    def variance(self, lam: LocationScaleNatural) -> PyTree:
        return jax.tree.map(lambda s: s * s * self.law.variance, lam.scale)

    def in_domain(self, lam: LocationScaleNatural) -> Bool[Array, ""]:
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(lam.location)]
        return self._positive(lam.scale) & jnp.all(jnp.array(finite))

    def log_prob(self, lam: LocationScaleNatural, theta: PyTree) -> Float[Array, ...]:
        """log q(theta), summed over the tree; theta may have leading axes."""
        if self.law.log_density is None:
            raise ValueError(f"noise={self.law.name}: its density is not known.")

        def leaf(m: Array, s: Array, x: Array) -> Array:
            terms = self.law.log_density((x - m) / s) - jnp.log(s)
            return jnp.sum(terms, axis=tuple(range(terms.ndim - jnp.ndim(m), terms.ndim)))

        return sum(jax.tree.leaves(jax.tree.map(leaf, *lam, theta)))

    def entropy(self, lam: LocationScaleNatural) -> Float[Array, ""]:
        """H(q) in nats."""
        if self.law.entropy is None:
            return super().entropy(lam)
        return sum(jnp.sum(jnp.log(s) + self.law.entropy) for s in jax.tree.leaves(lam.scale))


class SignedScale(Moved):
    """theta = plus n+ - minus n-, every weight with its own pair; the law is positive."""

    Natural: ClassVar[type] = SignedScaleNatural
    draws: ClassVar[int] = 2

    def natural(self, *, plus: PyTree, minus: PyTree) -> SignedScaleNatural:
        """From trees like theta."""
        return SignedScaleNatural(plus, minus)

    def standard(self, lam: SignedScaleNatural) -> dict[str, PyTree]:
        return {"plus": lam.plus, "minus": lam.minus}

    def moved(self, n: Array, plus: Array, minus: Array) -> Array:
        return plus * n[0] - minus * n[1]

    def mean(self, lam: SignedScaleNatural) -> PyTree:
        return jax.tree.map(lambda p, m: self.law.mean * (p - m), *lam)

    def variance(self, lam: SignedScaleNatural) -> PyTree:
        return jax.tree.map(lambda p, m: self.law.variance * (p * p + m * m), *lam)

    def in_domain(self, lam: SignedScaleNatural) -> Bool[Array, ""]:
        return self._positive(lam)

    def log_prob(self, lam: SignedScaleNatural, theta: PyTree) -> Float[Array, ...]:
        """Refused: the density of a difference is an integral."""
        raise ValueError(
            "SignedScale: the density of theta = g+ n+ - g- n- has no closed form; draw from it, "
            "or use its mean and variance."
        )
