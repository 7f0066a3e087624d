"""What the tests of families know about a family from elsewhere: one row each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from blr_optax.families import ExponentialFamily


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, so that results can be cached
class Row:
    """A family under test.

    Attributes:
        family: the family.
        kind: what theta is; families of a kind share most of their code, and the first row of
            every kind is tested in every run.
        members: standard parameters of three members (or more) whose arrays stack; they share the
            known fields.
        logpdf: (standard parameters, points) -> log density by scipy, or from its formula in numpy.
        rule: standard parameters -> (points, weights), a quadrature rule or a sum over the support:
            points are theta with a leading axis, and sum_k w_k f(x_k) is the integral of f wherever
            f carries the density as a factor.
        bad: standard parameters that must be refused, each with what the error must name.
        outside: natural parameters that are no member.
        moment: points -> what `mean` and `variance` are of, when it is not theta (labels: one-hot).
    """

    family: ExponentialFamily
    kind: str
    members: tuple[dict, ...]
    logpdf: Callable[[dict, Any], np.ndarray]
    rule: Callable[[dict], tuple[Any, np.ndarray]]
    bad: tuple[tuple[str, dict], ...]
    outside: tuple[Any, ...]
    moment: Callable[[Any], Any] = lambda points: points


def spd(seed, d=2):
    """A random symmetric positive definite matrix."""
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T / d + 0.3 * np.eye(d)


def line(m, v):
    """A quadrature rule for densities that look like N(m, v): trapezes over twelve sds."""
    z, h = np.linspace(-12, 12, 2001, retstep=True)
    return m + np.sqrt(v) * z, np.full(z.size, h * np.sqrt(v))


def plane(m, cov):
    """The same in two dimensions."""
    z, h = np.linspace(-9, 9, 121, retstep=True)
    root = np.linalg.cholesky(cov)
    points = np.stack(np.meshgrid(z, z), -1).reshape(-1, 2) @ root.T + m
    return points, np.full(len(points), h * h * np.linalg.det(root))


def grid(low, high, count=4001):
    """Trapezes on an interval whose ends do not matter."""
    x, h = np.linspace(low, high, count, retstep=True)
    return x, np.full(count, h)


def half_line(centre=1.0, count=4001, reach=30.0):
    """Trapezes in log x over the positive numbers, within exp(-+reach) of a centre."""
    z, h = np.linspace(-reach, reach, count, retstep=True)
    x = centre * np.exp(z)
    return x, h * x


def unit_interval(count=4001, reach=40.0):
    """Trapezes in the logit of x over (0, 1)."""
    z, h = np.linspace(-reach, reach, count, retstep=True)
    x = 1 / (1 + np.exp(-z))
    return x, h * x * (1 / (1 + np.exp(z)))
