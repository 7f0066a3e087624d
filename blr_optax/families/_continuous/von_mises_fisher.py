"""The von Mises-Fisher density on the unit sphere in d dimensions.

    q(x) = exp(kappa <u, x> - A)      lambda = kappa u      mu = R u = rho lambda

    u, kappa    direction and concentration         nu     d / 2 - 1
    R           mean resultant length, rho kappa    sigma  dR / dkappa

The Fisher matrix is sigma along u and rho across it. A, rho and sigma are smooth functions of
kappa^2, so that kappa = 0, the uniform density, is a member like any other.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _loops
from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import Parameter, checked
from blr_optax.families._numerics.bessel import Bessel, bessel
from blr_optax.families._numerics.special import LOG_2PI
from blr_optax.families._numerics.sphere_draws import attach, draw, polar

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import NaturalParameters, PyTree

NEWTON_STEPS = 8
OFF_SPHERE = 1e-3  # how far |x|^2 may be from one
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS


@parameters
class VonMisesFisherNatural(NamedTuple):
    """lambda of a von Mises-Fisher density: kappa u."""

    linear: Array


@parameters
class VonMisesFisherExpectation(NamedTuple):
    """mu of a von Mises-Fisher density: E[x]."""

    linear: Array


def _dot(a: Array, b: Array) -> Float[Array, ...]:
    return jnp.sum(a * b, axis=-1)


def _bessel_at(linear: Array) -> Bessel:
    return bessel(0.5 * linear.shape[-1] - 1.0, _dot(linear, linear))


class _Curvature(NamedTuple):
    """The Fisher matrix at a lambda: rho I + bend lambda lambda^T, with bend = 2 rho'(kappa^2).

    That would cancel along u for large kappa. Beyond kappa = 1, where u is well defined, it is
    written as rho across u and sigma along it instead. All fields but `linear` are columns.
    """

    linear: Array
    x: Array
    ratio: Array
    slope: Array
    bend: Array

    @classmethod
    def of(cls, linear: Array, b: Bessel) -> _Curvature:
        columns = (_dot(linear, linear), b.ratio, b.slope, b.bend)
        return cls(linear, *(x[..., None] for x in columns))

    @classmethod
    def at(cls, linear: Array) -> _Curvature:
        return cls.of(linear, _bessel_at(linear))

    def split(self, v: Array) -> tuple[Array, Array, Array]:
        """v along u and v across it, beyond kappa = 1; v and lambda <lambda, v> before."""
        beyond = self.x > 1.0
        over = jnp.where(beyond, self.linear / jnp.where(beyond, self.x, 1.0), 0.0)
        along = _dot(over, v)[..., None] * self.linear
        # Once more, for what rounding left along u: across u, F is larger by kappa.
        rest = _dot(over, v - along)[..., None] * self.linear
        near = jnp.where(beyond, 0.0, self.linear)
        return along + rest, (v - along) - rest, _dot(near, v)[..., None] * near

    def product(self, v: Array) -> Array:
        """F v."""
        along, across, low = self.split(v)
        return self.ratio * across + self.slope * along + self.bend * low

    def solve(self, v: Array) -> Array:
        """F^{-1} v."""
        along, across, low = self.split(v)
        return (across - self.bend / self.slope * low) / self.ratio + along / self.slope

    def norm(self, v: Array) -> Array:
        """<v, F v>."""
        along, across, low = self.split(v)
        parts = self.ratio * across**2 + self.slope * along**2 + self.bend * low * v
        return jnp.sum(parts, axis=-1)

    def diagonal(self) -> Array:
        """Return the diagonal of F."""
        beyond, square = self.x > 1.0, self.linear**2
        x = jnp.where(beyond, self.x, 1.0)
        far = (self.ratio * (x - square) + self.slope * square) / x
        return jnp.where(beyond, far, self.ratio + self.bend * square)


@jax.custom_jvp
@jax.jit
def _solve(mu: Array) -> Array:
    """Return the lambda with rho lambda = mu for |mu| < 1, by Newton in kappa."""
    nu, length = 0.5 * mu.shape[-1] - 1.0, jnp.sqrt(_dot(mu, mu))
    rest = 1.0 - length

    def newton(_: Array, kappa: Array) -> Array:
        b = bessel(nu, kappa * kappa)
        # Close to one the digits are in 1 - R, and log(1 - R) is a straight line in log kappa.
        bent = kappa * jnp.exp(jnp.clip(jnp.log(b.rest / rest) * b.rest / (kappa * b.slope), -2, 2))
        return jnp.where(length > 0.5, bent, kappa + (length - b.ratio * kappa) / b.slope)

    start = length * (mu.shape[-1] - length**2) / (rest * (1.0 + length))
    kappa = _loops.fori_loop(0, NEWTON_STEPS, newton, start)
    return mu / bessel(nu, kappa * kappa).ratio[..., None]


@_solve.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (mu,), (dmu,) = primals, tangents
    linear = _solve(mu)
    return linear, _Curvature.at(linear).solve(dmu)


def _is_direction(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x), -1) & jnp.any(x != 0, -1)


@dataclasses.dataclass(frozen=True)
class VonMisesFisher(ExponentialFamily):
    """The von Mises-Fisher density of a unit vector; the event is the last axis, d >= 2.

    log q(x) = kappa <u, x> - d / 2 log(2 pi) - log I_nu(kappa) + nu log kappa,  nu = d / 2 - 1,

    with respect to the surface measure of the sphere. d = 2 is the von Mises density of an angle.

    Standard parameters: `direction` u [..., d], of any length but zero, and `concentration` kappa.
    For kappa = 0 `standard` returns the first axis.

    lambda: linear = kappa u [..., d]. mu: linear = E[x] [..., d].

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> sphere = blr.families.VonMisesFisher()
      >>> lam = sphere.natural(direction=jnp.array([0.0, 0.0, 2.0]), concentration=5.0)
      >>> print(lam.linear, sphere.mean(lam).round(4))
      [0. 0. 5.] [0.     0.     0.8001]
    """

    Natural: ClassVar[type] = VonMisesFisherNatural
    Expectation: ClassVar[type] = VonMisesFisherExpectation
    domains: ClassVar[dict] = {"linear": domain.real(1)}
    event_ndim: ClassVar[int] = 1

    @checked(
        direction=Parameter("finite and not zero", _is_direction, "d", 2, unique=False),
        concentration=Parameter("non-negative and finite", lambda k: (k >= 0) & jnp.isfinite(k)),
    )
    def natural(self, *, direction: ArrayLike, concentration: ArrayLike) -> VonMisesFisherNatural:
        """lambda from a direction (not zero; its length is ignored) and a concentration (>= 0)."""
        u = direction / jnp.max(jnp.abs(direction), axis=-1, keepdims=True)
        u = u / jnp.linalg.norm(u, axis=-1, keepdims=True)
        return VonMisesFisherNatural(jnp.expand_dims(concentration, -1) * u)

    def standard(self, lam: VonMisesFisherNatural) -> dict[str, Array]:
        kappa, u = polar(lam.linear)
        return {"direction": u, "concentration": kappa}

    def mean(self, lam: VonMisesFisherNatural) -> Array:
        """E[x], of length R <= 1: not itself on the sphere."""
        return _bessel_at(lam.linear).ratio[..., None] * lam.linear

    def variance(self, lam: VonMisesFisherNatural) -> Array:
        return _Curvature.at(lam.linear).diagonal()

    def log_partition(self, lam: VonMisesFisherNatural) -> Array:
        """Return A = d / 2 log(2 pi) + log I_nu(kappa) - nu log kappa."""
        return _bessel_at(lam.linear).log + 0.5 * lam.linear.shape[-1] * LOG_2PI

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> VonMisesFisherExpectation:
        return VonMisesFisherExpectation(theta)

    def log_base_measure(self, lam: VonMisesFisherNatural, theta: Array) -> Array:
        return jnp.zeros_like(_dot(lam.linear, theta))

    def expectation(self, lam: VonMisesFisherNatural) -> VonMisesFisherExpectation:
        return VonMisesFisherExpectation(self.mean(lam))

    def natural_from_expectation(
        self, mu: VonMisesFisherExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) by Newton in kappa; NaN, and status False, unless mu is inside the ball."""
        proper = domain.real(1).contains(mu.linear) & (_dot(mu.linear, mu.linear) < 1.0)
        inside = jnp.where(proper[..., None], mu.linear, 0.0)
        lam = VonMisesFisherNatural(jnp.where(proper[..., None], _solve(inside), jnp.nan))
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: VonMisesFisherNatural, theta: Array) -> Array:
        b, (kappa, u) = _bessel_at(lam.linear), polar(lam.linear)
        # kappa <u, x> - kappa = -kappa |x - u|^2 / 2, and log = entropy + kappa (1 - rest)
        far = -0.5 * kappa * _dot(theta - u, theta - u) - b.entropy + kappa * b.rest
        found = jnp.where(kappa > 1.0, far, _dot(lam.linear, theta) - b.log)
        on_sphere = jnp.abs(_dot(theta, theta) - 1.0) < OFF_SPHERE
        return jnp.where(on_sphere, found - 0.5 * theta.shape[-1] * LOG_2PI, -jnp.inf)

    def entropy(self, lam: VonMisesFisherNatural) -> Array:
        return _bessel_at(lam.linear).entropy + 0.5 * lam.linear.shape[-1] * LOG_2PI

    def kl(self, lam_p: VonMisesFisherNatural, lam_q: VonMisesFisherNatural) -> Array:
        lin_p, lin_q = jnp.broadcast_arrays(lam_p.linear, lam_q.linear)
        (kappa_p, u_p), (kappa_q, u_q) = polar(lin_p), polar(lin_q)
        move, nu = lin_q - lin_p, 0.5 * lin_p.shape[-1] - 1.0
        near = _dot(move, move) < 0.25 * jnp.maximum(kappa_p**2, (nu + 1.0) ** 2)
        # Close by it is the integral of (1 - t) <move, F move> over t from 0 to 1.
        step = jnp.where(near[..., None], move, 0.0)
        times = jnp.asarray(_NODES, step.dtype).reshape(-1, *(1,) * step.ndim)
        linears = jnp.concatenate([lin_p[None], lin_q[None], lin_p + times * step])
        found = _bessel_at(linears)
        p, q, between = (jax.tree.map(lambda x, i=i: x[i], found) for i in (0, 1, slice(2, None)))
        norms = _Curvature.of(linears[2:], between).norm(step)
        close = jnp.tensordot(jnp.asarray(_WEIGHTS * (1.0 - _NODES), step.dtype), norms, 1)
        turn = 0.5 * p.ratio * kappa_p * kappa_q * _dot(u_p - u_q, u_p - u_q)
        both = q.entropy - p.entropy - kappa_q * (q.rest - p.rest) + turn
        one = q.log - p.ratio * _dot(lin_p, lin_q) - p.entropy
        return jnp.where(near, close, jnp.where(jnp.minimum(kappa_p, kappa_q) > 1.0, both, one))

    def fisher_product(
        self, lam: VonMisesFisherNatural, v: VonMisesFisherNatural
    ) -> VonMisesFisherExpectation:
        """F = rho across u, sigma along it."""
        return VonMisesFisherExpectation(_Curvature.at(lam.linear).product(v.linear))

    def inverse_fisher_product(
        self, lam: VonMisesFisherNatural, v: VonMisesFisherExpectation
    ) -> VonMisesFisherNatural:
        return VonMisesFisherNatural(_Curvature.at(lam.linear).solve(v.linear))

    def sample(self, key: Array, lam: VonMisesFisherNatural, shape: tuple[int, ...] = ()) -> Array:
        x = draw(key, lam.linear, shape)
        return attach(jnp.broadcast_to(lam.linear, x.shape), x)
