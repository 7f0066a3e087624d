"""Exponential families: what a posterior can be, and its geometry (natural <-> expectation).

`register(name)`, `get(name, **static)` and `names()` are the registry.
"""

from __future__ import annotations

import importlib
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
from blr_optax.families._leafwise import Leafwise, LeafwiseNatural
from blr_optax.families._mean_field import MeanField
from blr_optax.families._parameters import parameters
from blr_optax.families._product import Product, ProductExpectation, ProductNatural
from blr_optax.families._raveled_conditional import RaveledConditional
from blr_optax.families._registry import REGISTRY, get, names, register
from blr_optax.families._rotated import Basis, Rotated, RotatedNatural
from blr_optax.families._side_by_side import SideBySide, SideBySideNatural

__all__ = [
    "Basis",
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Conditional",
    "Dirichlet",
    "Domain",
    "Exponential",
    "Family",
    "FixedExpectation",
    "FixedNatural",
    "Gamma",
    "Gaussian",
    "GaussianExpectation",
    "GaussianFixed",
    "GaussianLowRank",
    "GaussianNatural",
    "Geometric",
    "InverseGamma",
    "InverseGaussian",
    "InverseWishart",
    "Laplace",
    "Leafwise",
    "LeafwiseNatural",
    "LogNormal",
    "MatrixGaussian",
    "MeanField",
    "MeanPrecision",
    "MeanVariance",
    "Mixture",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "NormalGamma",
    "NormalInverseGamma",
    "NormalWishart",
    "Pinned",
    "PinnedNatural",
    "Poisson",
    "Product",
    "ProductExpectation",
    "ProductNatural",
    "Rademacher",
    "Raveled",
    "RaveledConditional",
    "Rotated",
    "RotatedNatural",
    "SideBySide",
    "SideBySideNatural",
    "SkewGaussian",
    "StudentT",
    "VonMisesFisher",
    "Weibull",
    "Wishart",
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
    "_categorical": ("Categorical",),
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
    "_multinomial": ("Multinomial",),
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


# A string is the name of a class of this module.
REGISTRY |= {
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
