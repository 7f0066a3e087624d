"""Independent members of different families, under one name each.

    q(theta) = prod_k q_k(theta_k),   theta, mean and samples are dicts

This is the structure of mean-field message passing: a Gaussian for the weights beside a gamma for
their precision, say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.families._base.exponential import Family
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.registry import get

if TYPE_CHECKING:
    from jaxtyping import Array


@parameters
class ProductNatural(NamedTuple):
    """lambda of every factor, by name."""

    parts: dict[str, Any]


@parameters
class ProductExpectation(NamedTuple):
    """mu of every factor, by name."""

    parts: dict[str, Any]


@dataclasses.dataclass(frozen=True, init=False)
class Product(Family):
    """Independent factors of different families, joined in a dict.

    log q(theta) = sum_k log q_k(theta_k); `log_prob`, `entropy` and `kl` are sums over all factors
    and their batches.

    Standard parameters: per factor, a dict of its own standard parameters, or its lambda.

    lambda: parts = dict of every factor's lambda. mu: parts = dict of every factor's mu: a loss of
    mu for `estimators.closed_form()` reads `mu.parts["mean"].linear`.

    Attributes:
        factors: (name, family) pairs, sorted by name; given as a dict of families or their
            registered names.

    Raises:
        ValueError: for something that is not a dict of families.

    Example:
      >>> import blr_optax as blr
      >>> q = blr.families.Product({"mean": "normal", "precision": "gamma"})
      >>> lam = q.natural(
      ...     mean={"mean": 0.0, "variance": 4.0}, precision={"concentration": 2.0, "rate": 1.0}
      ... )
      >>> print(q.mean(lam)["precision"], q.entropy(lam).round(4))
      2.0 3.6893
    """

    factors: tuple[tuple[str, Family], ...]
    Natural: ClassVar[type] = ProductNatural
    Expectation: ClassVar[type] = ProductExpectation

    def __init__(self, factors: Mapping[str, Family | str]) -> None:
        """Sorts the factors by name, so that equal dicts make equal families."""
        is_dict = isinstance(factors, Mapping)
        families = {name: get(f) for name, f in factors.items()} if is_dict else {}
        if not families or not all(isinstance(family, Family) for family in families.values()):
            raise ValueError(
                f"Product: give a dict of exponential families, by name; got {factors!r}."
            )
        object.__setattr__(self, "factors", tuple(sorted(families.items())))

    domains = property(lambda self: {name: family.domains for name, family in self.factors})
    # A property, so that A gets no derivative rule: the factors' own know their known fields.
    known = property(lambda self: ())
    location = property(lambda self: all(family.location for _, family in self.factors))
    reparameterized = property(lambda self: all(f.reparameterized for _, f in self.factors))
    enumerable = property(lambda self: all(f.enumerable for _, f in self.factors))
    constant_base_measure = property(
        lambda self: all(f.constant_base_measure for _, f in self.factors)
    )
    elementwise = False

    def _each(self, method: str, *trees: Any, **fixed: Any) -> dict[str, Any]:
        """A method of every factor, on its own part of every tree."""

        def part(tree: Any, name: str) -> Any:
            return (tree.parts if isinstance(tree, (self.Natural, self.Expectation)) else tree)[
                name
            ]

        return {
            name: getattr(family, method)(*(part(tree, name) for tree in trees), **fixed)
            for name, family in self.factors
        }

    def _total(self, method: str, *trees: Any) -> Array:
        return sum(jnp.sum(value) for value in self._each(method, *trees).values())

    def natural(self, **standard: Any) -> ProductNatural:
        """lambda from every factor's standard parameters (a dict), or its lambda."""
        names = [name for name, _ in self.factors]
        if sorted(standard) != names:
            raise ValueError(
                f"product.natural: the factors are {names}, each a keyword; got {sorted(standard)}."
            )

        def part(name: str, family: Family) -> Any:
            given = standard[name]
            if isinstance(given, Mapping):
                try:
                    return family.natural(**given)
                except ValueError as error:
                    raise ValueError(f"factor {name!r}: {error}") from error
            if not isinstance(given, family.Natural):
                raise ValueError(
                    f"Product: factor {name!r} is a dict of standard parameters, or a "
                    f"{family.Natural.__name__}; got {type(given).__name__}."
                )
            return given

        return ProductNatural({name: part(name, family) for name, family in self.factors})

    def standard(self, lam: ProductNatural) -> dict[str, Any]:
        return self._each("standard", lam)

    def natural_at(self, location: Any, like: Any = None) -> ProductNatural:
        pairs = ((name, family, location[name]) for name, family in self.factors)
        return ProductNatural(
            {n: f.natural_at(x, None if like is None else like.parts[n]) for n, f, x in pairs}
        )

    def log_partition(self, lam: ProductNatural) -> Array:
        """A = sum_k A_k."""
        return self._total("log_partition", lam)

    def inner(self, a: Any, b: Any) -> Array:
        return self._total("inner", a, b)

    def check_sizes(self, *lams: Any) -> None:
        for name, family in self.factors:
            family.check_sizes(*(lam.parts[name] for lam in lams))

    def combine(self, *terms: tuple[Any, Any]) -> ProductNatural:
        return ProductNatural(
            {
                name: family.combine(*((a, lam.parts[name]) for a, lam in terms))
                for name, family in self.factors
            }
        )

    def sufficient_statistics(self, theta: Any, lam: Any = None) -> ProductExpectation:
        given = (theta,) if lam is None else (theta, lam)
        return ProductExpectation(self._each("sufficient_statistics", *given))

    def log_base_measure(self, lam: ProductNatural, theta: Any) -> Array:
        return self._total("log_base_measure", lam, theta)

    def expected_log_base_measure(self, lam: ProductNatural) -> Array:
        return self._total("expected_log_base_measure", lam)

    def base_measure_gradient(self, lam: ProductNatural) -> ProductNatural:
        return ProductNatural(self._each("base_measure_gradient", lam))

    def log_prob(self, lam: ProductNatural, theta: Any) -> Array:
        """Sums over batches and factors; leading sample axes of theta stay."""
        total = 0.0
        for name, family in self.factors:
            one = family.log_prob(lam.parts[name], theta[name])
            batch = jnp.ndim(jax.eval_shape(family.log_partition, lam.parts[name]))
            total = total + jnp.sum(one, axis=tuple(range(jnp.ndim(one) - batch, jnp.ndim(one))))
        return total

    def entropy(self, lam: ProductNatural) -> Array:
        return self._total("entropy", lam)

    def kl(self, lam_p: ProductNatural, lam_q: ProductNatural) -> Array:
        return self._total("kl", lam_p, lam_q)

    def mean(self, lam: ProductNatural) -> dict[str, Any]:
        return self._each("mean", lam)

    def variance(self, lam: ProductNatural) -> dict[str, Any]:
        return self._each("variance", lam)

    def sample(self, key: Array, lam: ProductNatural, shape: tuple[int, ...] = ()) -> Any:
        """Draws of every factor, each with its own key by name."""

        def own(name: str) -> Array:
            return jax.random.fold_in(key, _tree.path_hash((jax.tree_util.DictKey(name),)))

        return {
            name: family.sample(own(name), lam.parts[name], shape) for name, family in self.factors
        }

    def expectation(self, lam: ProductNatural) -> ProductExpectation:
        return ProductExpectation(self._each("expectation", lam))

    def natural_from_expectation(self, mu: ProductExpectation, with_status: bool = False) -> Any:
        lam = ProductNatural(self._each("natural_from_expectation", mu))
        return (lam, self.in_domain(lam)) if with_status else lam

    def fisher_product(self, lam: ProductNatural, v: Any) -> ProductExpectation:
        return ProductExpectation(self._each("fisher_product", lam, v))

    def inverse_fisher_product(self, lam: ProductNatural, v: Any) -> ProductNatural:
        return ProductNatural(self._each("inverse_fisher_product", lam, v))

    def gradient_in_mu(self, gradient: Any) -> ProductNatural:
        return ProductNatural(self._each("gradient_in_mu", gradient))

    def gradient_in_lambda(self, lam: ProductNatural, gradient: Any) -> ProductNatural:
        return ProductNatural(self._each("gradient_in_lambda", lam, gradient))

    def coordinates(self, like: Any) -> tuple[Any, Any]:
        maps = {name: family.coordinates(like.parts[name]) for name, family in self.factors}
        sizes = [maps[name][0](like.parts[name]).size for name in maps]

        def to_flat(x: Any) -> Array:
            return jnp.concatenate([maps[name][0](x.parts[name]) for name in maps])

        def to_fields(flat: Array) -> ProductNatural:
            ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
            pieces = zip(maps, ends, sizes, strict=True)
            return ProductNatural({n: maps[n][1](flat[e - size : e]) for n, e, size in pieces})

        return to_flat, to_fields

    def in_domain(self, lam: ProductNatural) -> Array:
        return jnp.array([jnp.all(x) for x in self._each("in_domain", lam).values()]).all()

    def retract(self, lam: ProductNatural, step: Any) -> ProductNatural:
        return ProductNatural(self._each("retract", lam, step))

    def safe_step(self, lam: ProductNatural, step: Any) -> tuple[ProductNatural, Array]:
        steps = self._each("safe_step", lam, step)
        return ProductNatural({name: new for name, (new, _) in steps.items()}), sum(
            count for _, count in steps.values()
        )

    def support(self, lam: ProductNatural, total: int | None = None) -> dict[str, Any]:
        return self._each("support", lam, total=total)

    def probabilities(self, mu: ProductExpectation, total: int | None = None) -> dict[str, Any]:
        return self._each("probabilities", mu, total=total)

    def fisher(self, lam: ProductNatural) -> Array:
        """Blocks on the diagonal, factor by factor."""
        blocks = [family.fisher(lam.parts[name]) for name, family in self.factors]
        if any(block.ndim > 2 for block in blocks):
            raise ValueError("Product.fisher: factors must not be batched; use fisher_product.")
        return jax.scipy.linalg.block_diag(*blocks)
