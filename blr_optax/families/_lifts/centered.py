"""A family whose statistics are counted from a point near the data.

    T(theta - c) in place of T(theta)

For data far from the origin the statistics x^2 and x of one density nearly cancel: the rate of a
normal-gamma density is what is left of -lambda_precision - kappa m^2 / 2, and in float32 a mean of
1000 with a deviation of 1 leaves it no digits. Counted from c, kappa (m - c)^2 is small.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax._validate import concrete
from blr_optax.families._base.family import Family, derived
from blr_optax.families._base.registry import get
from blr_optax.families._base.standard_parameters import as_number, check_keywords, name_of
from blr_optax.families._lifts.viewed import Viewed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blr_optax._typing import NaturalParameters, PyTree


@dataclasses.dataclass(frozen=True, init=False)
class Centered(Viewed):
    """A family with a `mean`, such as `normal_gamma`, with statistics of theta - at.

    Standard parameters, draws, densities and moments are those of the wrapped family: theta is
    counted from the origin. lambda and mu are counted from `at`, which is fixed: an E_q[loss] that
    is a function of mu, or a conjugate term, is written with data - at. Members with different
    `at` have no common arithmetic, and are refused.

    Attributes:
        family: a family with the standard parameter `mean`.
        at: the point, one number or a tuple of them, as the mean's last axis; near the data.

    Raises:
        ValueError: for a family without a mean, or a point that is traced or not finite.

    Example:
      >>> import blr_optax as blr
      >>> far = blr.families.Centered("normal_gamma", at=10_000.0)
      >>> lam = far.natural(mean=10_001.0, kappa=1.0, concentration=2.0, rate=3.0)
      >>> print(lam.linear, far.mean(lam).mean, far.standard(lam)["rate"])
      1.0 10001.0 3.0
    """

    family: Family
    at: float | tuple[float, ...]

    def __init__(self, family: Family | str, at: float | Sequence[float]) -> None:
        """Make the point numbers of Python, so that families are compared by value."""
        inner = get(family)
        if not inner.exponential or "mean" not in inspect.signature(inner.natural).parameters:
            raise ValueError(
                f"Centered: {name_of(inner)} has no standard parameter `mean` to count from a "
                "point; families that have one: normal, gaussian, normal_gamma, "
                "normal_inverse_gamma, normal_wishart."
            )
        if not concrete(at):
            raise ValueError("Centered: at= must have a value, known outside jit: it never moves.")
        point = np.asarray(at, np.float64)
        if point.ndim > 1 or not np.isfinite(point).all():
            raise ValueError(f"Centered: at={at} must be a finite number, or a vector of them.")
        object.__setattr__(self, "family", inner)
        object.__setattr__(self, "at", tuple(point.tolist()) if point.ndim else float(point))

    event_ndim = derived(lambda self: self.family.event_ndim)
    elementwise = derived(lambda self: self.family.elementwise)

    def _shifted(self, theta: PyTree, sign: float) -> PyTree:
        """Theta plus or minus `at`, in the mean of joint families."""
        if getattr(self.family, "joint", False):
            return theta._replace(mean=self._shifted_mean(theta.mean, sign))
        return self._shifted_mean(theta, sign)

    def _shifted_mean(self, x: Any, sign: float) -> Any:
        if concrete(x) and not isinstance(x, jax.Array):  # in as many digits as were given
            moved = np.asarray(x, np.float64) + sign * np.asarray(self.at)
            return moved.astype(x.dtype) if hasattr(x, "dtype") else moved.tolist()
        return x + jnp.asarray(sign * np.asarray(self.at), jnp.result_type(x, float))

    def inward(self, theta: PyTree) -> PyTree:
        return self._shifted(jax.tree.map(jnp.asarray, theta), -1.0)

    def outward(self, x: PyTree) -> PyTree:
        return self._shifted(x, 1.0)

    def natural(self, **standard: PyTree) -> NaturalParameters:
        """Return lambda of theta - at, from the standard parameters of theta."""
        who = f"{name_of(self.family)}.natural"
        check_keywords(who, self.family.natural, standard)
        as_number(who, "mean", standard["mean"])
        mean = self._shifted_mean(standard["mean"], -1.0)
        return self.family.natural(**{**standard, "mean": mean})

    def standard(self, lam: NaturalParameters) -> dict[str, PyTree]:
        found = self.family.standard(lam)
        return {**found, "mean": self._shifted_mean(found["mean"], 1.0)}

    def variance(self, lam: NaturalParameters) -> PyTree:
        return self.family.variance(lam)
