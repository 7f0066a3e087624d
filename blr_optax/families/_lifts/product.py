"""Independent members of different families, under one name each.

    q(theta) = prod_k q_k(theta_k),   theta, mean and samples are dicts

This is the structure of mean-field message passing: a Gaussian for the weights beside a gamma for
their precision, say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.family import Family, derived
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.registry import get
from blr_optax.families._lifts.independent import Independent

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import NaturalParameters, PyTree


@parameters
class ProductNatural(NamedTuple):
    """lambda of every factor, by name."""

    parts: dict[str, PyTree]


@parameters
class ProductExpectation(NamedTuple):
    """mu of every factor, by name."""

    parts: dict[str, PyTree]


@dataclasses.dataclass(frozen=True, init=False)
class Product(Independent, ExponentialFamily):
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

    factors: tuple[tuple[str, ExponentialFamily], ...]
    Natural: ClassVar[type] = ProductNatural
    Expectation: ClassVar[type] = ProductExpectation

    def __init__(self, factors: Mapping[str, ExponentialFamily | str]) -> None:
        """Sorts the factors by name, so that equal dicts make equal families."""
        is_dict = isinstance(factors, Mapping)
        families = {name: get(f) for name, f in factors.items()} if is_dict else {}
        if not families or not all(
            isinstance(family, Family) and family.exponential for family in families.values()
        ):
            raise ValueError(
                f"Product: give a dict of exponential families, by name; got {factors!r}."
            )
        object.__setattr__(self, "factors", tuple(sorted(families.items())))

    domains = derived(lambda self: {name: family.domains for name, family in self.factors})
    # A property, so that A gets no derivative rule: the factors' own know their known fields.
    known = derived(lambda self: ())
    location = derived(lambda self: all(family.location for _, family in self.factors))
    reparameterized = derived(lambda self: all(f.reparameterized for _, f in self.factors))
    enumerable = derived(lambda self: all(f.enumerable for _, f in self.factors))
    constant_base_measure = derived(
        lambda self: all(f.constant_base_measure for _, f in self.factors)
    )
    elementwise = False

    def part(
        self, lam: NaturalParameters, path: tuple[str | int, ...]
    ) -> tuple[Family, NaturalParameters]:
        """Return the factor of a name, or a part of it."""
        own = _tree.subtree(lam.parts, path[:1], "part")
        family = dict(self.factors)[str(path[0])]
        return family.part(own, path[1:]) if path[1:] else (family, own)

    def members(self, like: PyTree) -> list[ExponentialFamily]:
        return [family for _, family in self.factors]

    def split(self, x: PyTree, like: PyTree) -> list[PyTree]:
        parts = x.parts if isinstance(x, (ProductNatural, ProductExpectation)) else x
        return [parts[name] for name, _ in self.factors]

    def joined(self, kind: type | None, parts: Sequence[PyTree], like: PyTree) -> PyTree:
        """Return a dict by name, in lambda and mu as `parts`."""
        named = {name: part for (name, _), part in zip(self.factors, parts, strict=True)}
        return named if kind is None else kind(named)

    def keys(self, key: Array, like: PyTree) -> list[Array]:
        """By the factor's name, so that other factors do not matter."""
        paths = [(jax.tree_util.DictKey(name),) for name, _ in self.factors]
        return [jax.random.fold_in(key, _tree.path_hash(path)) for path in paths]

    def batch_ndim(self, member: Family, lam: NaturalParameters) -> int:
        """Return the batch axes of a factor."""
        return jnp.ndim(jax.eval_shape(member.log_partition, lam))

    def natural(self, **standard: PyTree) -> ProductNatural:
        """lambda from every factor's standard parameters (a dict), or its lambda."""
        names = [name for name, _ in self.factors]
        if sorted(standard) != names:
            raise ValueError(
                f"product.natural: the factors are {names}, each a keyword; got {sorted(standard)}."
            )

        def part(name: str, family: ExponentialFamily) -> Any:
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

    def standard(self, lam: ProductNatural) -> dict[str, PyTree]:
        return self._theta("standard", lam)
