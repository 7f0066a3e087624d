"""Exponential families: what a posterior can be, and its geometry (natural <-> expectation).

`register(name)`, `get(name, **static)` and `names()` are the registry.
"""

from blr_optax.families._base.conditional import ConditionalFamily
from blr_optax.families._base.domain import Domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.family import Family
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.registry import REGISTRY, get, names, register
from blr_optax.families._conditional.low_rank import GaussianLowRank
from blr_optax.families._conditional.matrix_gaussian import MatrixGaussian
from blr_optax.families._conditional.mixture import Mixture
from blr_optax.families._conditional.skew_gaussian import SkewGaussian
from blr_optax.families._conditional.student_t import StudentT
from blr_optax.families._continuous.dirichlet import Beta, Dirichlet
from blr_optax.families._continuous.gamma import Exponential, Gamma, InverseGamma
from blr_optax.families._continuous.gaussian import (
    FixedExpectation,
    FixedNatural,
    Gaussian,
    GaussianExpectation,
    GaussianFixed,
    GaussianNatural,
    Normal,
)
from blr_optax.families._continuous.inverse_gaussian import InverseGaussian
from blr_optax.families._continuous.joint import MeanPrecision, MeanVariance
from blr_optax.families._continuous.normal_gamma import NormalGamma, NormalInverseGamma
from blr_optax.families._continuous.point import Point, PointExpectation, PointNatural
from blr_optax.families._continuous.positive import Laplace, LogNormal, Weibull
from blr_optax.families._continuous.von_mises_fisher import VonMisesFisher
from blr_optax.families._discrete.bernoulli import Bernoulli, Rademacher
from blr_optax.families._discrete.categorical import Categorical
from blr_optax.families._discrete.counts import Binomial, Geometric, NegativeBinomial, Poisson
from blr_optax.families._discrete.multinomial import Multinomial
from blr_optax.families._lifts.centered import Centered
from blr_optax.families._lifts.leafwise import Leafwise, LeafwiseNatural
from blr_optax.families._lifts.mean_field import MeanField
from blr_optax.families._lifts.product import Product, ProductExpectation, ProductNatural
from blr_optax.families._lifts.raveled import Raveled
from blr_optax.families._lifts.side_by_side import (
    SideBySide,
    SideBySideExpectation,
    SideBySideNatural,
)
from blr_optax.families._matrix.inverse_wishart import InverseWishart
from blr_optax.families._matrix.normal_wishart import NormalWishart
from blr_optax.families._matrix.wishart import Wishart

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Centered",
    "ConditionalFamily",
    "Family",
    "Dirichlet",
    "Domain",
    "Exponential",
    "ExponentialFamily",
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
    "Point",
    "PointExpectation",
    "PointNatural",
    "Poisson",
    "Product",
    "ProductExpectation",
    "ProductNatural",
    "Rademacher",
    "Raveled",
    "SideBySide",
    "SideBySideExpectation",
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

REGISTRY |= {
    "normal": Normal,
    "gaussian": Gaussian,
    "gaussian_fixed": GaussianFixed,
    "gaussian_diagonal": lambda: MeanField(Normal()),
    "log_normal": LogNormal,
    "laplace": Laplace,
    "exponential": Exponential,
    "gamma": Gamma,
    "inverse_gamma": InverseGamma,
    "inverse_gaussian": InverseGaussian,
    "weibull": Weibull,
    "beta": Beta,
    "dirichlet": Dirichlet,
    "bernoulli": Bernoulli,
    "rademacher": Rademacher,
    "binomial": Binomial,
    "geometric": Geometric,
    "negative_binomial": NegativeBinomial,
    "poisson": Poisson,
    "categorical": Categorical,
    "multinomial": Multinomial,
    "von_mises_fisher": VonMisesFisher,
    "wishart": Wishart,
    "inverse_wishart": InverseWishart,
    "normal_gamma": NormalGamma,
    "normal_inverse_gamma": NormalInverseGamma,
    "normal_wishart": NormalWishart,
    # Conditional families: no exponential families themselves, with one inside.
    "mixture": Mixture,
    "skew_gaussian": SkewGaussian,
    "student_t": StudentT,
    "gaussian_low_rank": GaussianLowRank,
    "matrix_gaussian": MatrixGaussian,
}
