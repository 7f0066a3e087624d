"""Exponential families: what a posterior can be, and its geometry (natural <-> expectation).

`register(name)`, `get(name, **static)` and `names()` are the registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from blr_optax.families._composed import Pinned, PinnedNatural, Raveled
from blr_optax.families._conditional import Conditional
from blr_optax.families._domain import Domain
from blr_optax.families._family import Family
from blr_optax.families._gaussian import (
    Gaussian,
    GaussianExpectation,
    GaussianNatural,
    Normal,
)
from blr_optax.families._gaussian_fixed import FixedExpectation, FixedNatural, GaussianFixed
from blr_optax.families._mean_field import MeanField
from blr_optax.families._parameters import parameters
from blr_optax.families._product import Product, ProductExpectation, ProductNatural

__all__ = [
    "Conditional",
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Dirichlet",
    "Exponential",
    "Gamma",
    "GaussianLowRank",
    "Geometric",
    "InverseGamma",
    "InverseGaussian",
    "InverseWishart",
    "Laplace",
    "LogNormal",
    "MatrixGaussian",
    "MeanPrecision",
    "MeanVariance",
    "Mixture",
    "Multinomial",
    "NegativeBinomial",
    "NormalGamma",
    "NormalInverseGamma",
    "NormalWishart",
    "Poisson",
    "Rademacher",
    "SkewGaussian",
    "StudentT",
    "VonMisesFisher",
    "Weibull",
    "Wishart",
    "Domain",
    "Family",
    "FixedExpectation",
    "FixedNatural",
    "Gaussian",
    "GaussianExpectation",
    "GaussianFixed",
    "GaussianNatural",
    "MeanField",
    "Normal",
    "Pinned",
    "PinnedNatural",
    "Product",
    "ProductExpectation",
    "ProductNatural",
    "Raveled",
    "get",
    "names",
    "parameters",
    "register",
]

# Where the other families are: a file is imported when one of its families is first asked for.
_FILES = {
    "_bernoulli": (
        "Bernoulli",
        "Rademacher",
    ),
    "_categorical": (
        "Categorical",
        "Multinomial",
    ),
    "_counts": (
        "Binomial",
        "Geometric",
        "NegativeBinomial",
        "Poisson",
    ),
    "_dirichlet": (
        "Beta",
        "Dirichlet",
    ),
    "_gamma": (
        "Exponential",
        "Gamma",
        "InverseGamma",
    ),
    "_inverse_gaussian": ("InverseGaussian",),
    "_inverse_wishart": ("InverseWishart",),
    "_joint": (
        "MeanPrecision",
        "MeanVariance",
    ),
    "_low_rank": ("GaussianLowRank",),
    "_matrix_gaussian": ("MatrixGaussian",),
    "_mixture": ("Mixture",),
    "_normal_gamma": (
        "NormalGamma",
        "NormalInverseGamma",
    ),
    "_normal_wishart": ("NormalWishart",),
    "_positive": (
        "Laplace",
        "LogNormal",
        "Weibull",
    ),
    "_skew_gaussian": ("SkewGaussian",),
    "_student_t": ("StudentT",),
    "_von_mises_fisher": ("VonMisesFisher",),
    "_wishart": ("Wishart",),
}
_HOME = {name: file for file, members in _FILES.items() for name in members}


def __getattr__(name: str) -> Any:
    """A family class that is not imported yet."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


_REGISTRY: dict[str, Callable[..., Family | Conditional] | str] = {}


def register(name: str) -> Callable[[Callable[..., Family]], Callable[..., Family]]:
    """Decorator that registers a family, or a function that builds one, under a name.

    Raises:
        ValueError: when the name is taken.

    Example:
      >>> import blr_optax as blr
      >>> @blr.families.register("wide_normal")
      ... class WideNormal(blr.families.Normal):
      ...     '''A normal.'''
      >>> print("wide_normal" in blr.families.names())
      True
    """
    if name in _REGISTRY:
        raise ValueError(f"families.register: the name {name!r} is taken by {_REGISTRY[name]}.")

    def add(build: Callable[..., Family]) -> Callable[..., Family]:
        _REGISTRY[name] = build
        return build

    return add


def get(name: str | Family | Conditional, **static: Any) -> Family | Conditional:
    """The family registered under `name`, with its static choices; a Family passes through.

    Raises:
        ValueError: for an unknown name, listing the known ones.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.families.get("normal").natural(mean=2.0, precision=3.0).linear)
      6.0
    """
    if isinstance(name, (Family, Conditional)):
        return name
    if name not in _REGISTRY:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(names())}.")
    build = _REGISTRY[name]
    if isinstance(build, str):  # the name of a class of this module, see `_FILES`
        build = _REGISTRY[name] = __getattr__(build)
    return build(**static)


def names() -> tuple[str, ...]:
    """The registered names, sorted.

    Example:
      >>> import blr_optax as blr
      >>> print("gaussian" in blr.families.names())
      True
    """
    return tuple(sorted(_REGISTRY))


_REGISTRY |= {
    "normal": Normal,
    "gaussian": Gaussian,
    "gaussian_fixed": GaussianFixed,
    "gaussian_diagonal": lambda: MeanField(Normal()),
    "log_normal": "LogNormal",
    "laplace": "Laplace",
    "exponential": "Exponential",
    "gamma": "Gamma",
    "inverse_gamma": "InverseGamma",
    "inverse_gaussian": "InverseGaussian",
    "weibull": "Weibull",
    "beta": "Beta",
    "dirichlet": "Dirichlet",
    "bernoulli": "Bernoulli",
    "rademacher": "Rademacher",
    "binomial": "Binomial",
    "geometric": "Geometric",
    "negative_binomial": "NegativeBinomial",
    "poisson": "Poisson",
    "categorical": "Categorical",
    "multinomial": "Multinomial",
    "von_mises_fisher": "VonMisesFisher",
    "wishart": "Wishart",
    "inverse_wishart": "InverseWishart",
    "normal_gamma": "NormalGamma",
    "normal_inverse_gamma": "NormalInverseGamma",
    "normal_wishart": "NormalWishart",
    # Conditional families: no exponential families themselves, with one inside.
    "mixture": "Mixture",
    "skew_gaussian": "SkewGaussian",
    "student_t": "StudentT",
    "gaussian_low_rank": "GaussianLowRank",
    "matrix_gaussian": "MatrixGaussian",
}
