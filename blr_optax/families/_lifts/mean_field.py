"""Independent members of an elementwise family over any pytree of arrays.

The fields of a mean-field lambda are trees like the parameters, so optax's tree utilities, masks
and shardings see them as parameters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.families._base.exponential import Family
from blr_optax.families._base.registry import get
from blr_optax.families._base.standard_parameters import check_keywords, name_of

if TYPE_CHECKING:
    from jaxtyping import Array


def _join(kind: type, treedef: Any, leaves: list) -> Any:
    """One lambda or mu whose fields are trees, from one lambda or mu per leaf."""
    columns = range(len(kind._fields))
    return kind(*(treedef.unflatten([leaf[i] for leaf in leaves]) for i in columns))


@dataclasses.dataclass(frozen=True)
class MeanField(Family):
    """Independent members of an elementwise family, one per number of a pytree.

    q(theta) = prod_j q_j(theta_j). `log_prob`, `entropy` and `kl` are sums over the whole tree;
    theta may have leading sample axes.

    lambda and mu: those of the family, every field a tree like the parameters.

    Attributes:
        family: the elementwise family of every leaf, such as `families.get("normal")`, or its
            registered name.

    Raises:
        ValueError: when `family` is not elementwise.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> q = blr.families.MeanField("normal")
      >>> lam = q.natural(mean={"w": jnp.zeros(3), "b": jnp.ones(2)}, precision=4.0)
      >>> print(q.entropy(lam).round(4), q.variance(lam)["b"])
      3.629 [0.25 0.25]
    """

    family: Family

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", get(self.family))
        if not getattr(self.family, "elementwise", False):
            raise ValueError(
                f"MeanField: {type(self.family).__name__} is not elementwise: its samples or its "
                "parameters have axes of their own. Batches of it need no MeanField, different "
                "ones join in a Product, and Raveled takes a vector family over a tree."
            )

    # What the lifted family says of itself; fields of lambda are trees, their names stay.
    Natural = property(lambda self: self.family.Natural)
    Expectation = property(lambda self: self.family.Expectation)
    domains = property(lambda self: self.family.domains)
    known = property(lambda self: self.family.known)
    location = property(lambda self: self.family.location)
    constant_base_measure = property(lambda self: self.family.constant_base_measure)
    reparameterized = property(lambda self: self.family.reparameterized)
    enumerable = property(lambda self: self.family.enumerable)
    relaxable = property(lambda self: self.family.relaxable)
    curvature = property(lambda self: getattr(self.family, "curvature", None))
    elementwise = False  # it is the lift

    def _rows(self, lam: Any, *trees: Any) -> tuple[Any, list[tuple]]:
        """The tree's structure, and (leaf lambda, leaf of each tree) for every leaf.

        A tree that is itself a lambda or mu is split into leaf lambdas or mus.
        """
        treedef = jax.tree.structure(lam[0])

        def column(tree: Any) -> list:
            if isinstance(tree, (self.Natural, self.Expectation)):
                parts = zip(*map(treedef.flatten_up_to, tree), strict=True)
                return [type(tree)(*part) for part in parts]
            return treedef.flatten_up_to(tree)

        return treedef, list(zip(*map(column, (lam, *trees)), strict=True))

    def _map(self, f: Any, lam: Any, *trees: Any) -> Any:
        """The tree of f(leaf lambda, *leaves)."""
        treedef, rows = self._rows(lam, *trees)
        return treedef.unflatten([f(*row) for row in rows])

    def _fields(self, kind: type, f: Any, lam: Any, *trees: Any) -> Any:
        """Like `_map`, for an f that returns a lambda or mu: its fields become trees."""
        treedef, rows = self._rows(lam, *trees)
        return _join(kind, treedef, [f(*row) for row in rows])

    def _sum(self, f: Any, lam: Any, *trees: Any) -> Array:
        """Sum of f over leaves and over each leaf's own axes; leading sample axes stay."""
        _, rows = self._rows(lam, *trees)
        return sum(
            (jnp.sum(f(*row), axis=tuple(range(-jnp.ndim(row[0][0]), 0))) for row in rows),
            start=jnp.zeros(()),
        )

    def natural(self, **standard: Any) -> Any:
        """lambda from standard parameters: each a tree like the parameters, or a number."""
        who = f"mean field of {name_of(self.family)}.natural"
        check_keywords(who, self.family.natural, standard)
        standard = {name: x for name, x in standard.items() if x is not None}
        trees = (x for x in standard.values() if not jax.tree_util.all_leaves([x]))
        like = next(trees, next(iter(standard.values())))
        spread = [
            jax.tree.leaves(_tree.prefix_leaves(x, like, name)) for name, x in standard.items()
        ]
        paths = [_tree.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]

        def leaf(path: str, *values: Any) -> Any:
            try:
                return self.family.natural(**dict(zip(standard, values, strict=True)))
            except ValueError as error:
                raise ValueError(f"leaf {path or 'the root'}: {error}") from error

        leaves = [leaf(*row) for row in zip(paths, *spread, strict=True)]
        return _join(self.Natural, jax.tree.structure(like), leaves)

    def standard(self, lam: Any) -> dict[str, Any]:
        treedef, rows = self._rows(lam)
        leaves = [self.family.standard(*row) for row in rows]
        return {name: treedef.unflatten([leaf[name] for leaf in leaves]) for name in leaves[0]}

    def from_mean(self, mean: Any, precision: Any) -> Any:
        treedef = jax.tree.structure(mean)
        pairs = zip(treedef.flatten_up_to(mean), treedef.flatten_up_to(precision), strict=True)
        return _join(self.Natural, treedef, [self.family.from_mean(*pair) for pair in pairs])

    def natural_at(self, location: Any, like: Any = None) -> Any:
        leaves, treedef = jax.tree.flatten(location)
        old = [None] * len(leaves) if like is None else [row[0] for row in self._rows(like)[1]]
        new = [self.family.natural_at(x, lam) for x, lam in zip(leaves, old, strict=True)]
        return _join(self.Natural, treedef, new)

    def inner(self, a: Any, b: Any) -> Array:
        return self._sum(self.family.inner, a, b)

    def log_partition(self, lam: Any) -> Array:
        return self._sum(self.family.log_partition, lam)

    def log_base_measure(self, lam: Any, theta: Any) -> Array:
        return self._sum(self.family.log_base_measure, lam, theta)

    def expected_log_base_measure(self, lam: Any) -> Array:
        return self._sum(self.family.expected_log_base_measure, lam)

    def log_prob(self, lam: Any, theta: Any) -> Array:
        return self._sum(self.family.log_prob, lam, theta)

    def entropy(self, lam: Any) -> Array:
        return self._sum(self.family.entropy, lam)

    def kl(self, lam_p: Any, lam_q: Any) -> Array:
        return self._sum(self.family.kl, lam_p, lam_q)

    def in_domain(self, lam: Any) -> Array:
        _, rows = self._rows(lam)
        return jnp.all(jnp.array([jnp.all(self.family.in_domain(*row)) for row in rows]))

    def mean(self, lam: Any) -> Any:
        return self._map(self.family.mean, lam)

    def variance(self, lam: Any) -> Any:
        return self._map(self.family.variance, lam)

    def precision(self, lam: Any) -> Any:
        return self._map(self.family.precision, lam)

    def displace(self, lam: Any, z: Any) -> Any:
        return self._map(self.family.displace, lam, z)

    def sufficient_statistics(self, theta: Any, lam: Any = None) -> Any:
        leaves, treedef = jax.tree.flatten(theta)
        rows = [()] * len(leaves) if lam is None else self._rows(lam)[1]
        each = self.family.sufficient_statistics
        stats = [each(x, *row) for x, row in zip(leaves, rows, strict=True)]
        return _join(self.Expectation, treedef, stats)

    def sample(self, key: Array, lam: Any, shape: tuple[int, ...] = ()) -> Any:
        """Draws of every leaf, each with its own key by path."""
        draw = self.family.sample
        return self._map(lambda one, k: draw(k, one, shape), lam, self._keys(key, lam))

    def _keys(self, key: Array, lam: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: jax.random.fold_in(key, _tree.path_hash(path)), lam[0]
        )

    def expectation(self, lam: Any) -> Any:
        return self._fields(self.Expectation, self.family.expectation, lam)

    def natural_from_expectation(self, mu: Any, with_status: bool = False) -> Any:
        lam = self._fields(self.Natural, self.family.natural_from_expectation, mu)
        return (lam, self.in_domain(lam)) if with_status else lam

    def coordinates(self, like: Any) -> tuple[Any, Any]:
        _, to_learnt = jax.flatten_util.ravel_pytree({n: getattr(like, n) for n in self.domains})

        def to_flat(x: Any) -> Array:
            return jax.flatten_util.ravel_pytree({n: getattr(x, n) for n in self.domains})[0]

        known = {name: getattr(like, name) for name in self.known}
        return to_flat, lambda flat: self.Natural(**to_learnt(flat), **known)

    def fisher_product(self, lam: Any, v: Any) -> Any:
        return self._fields(self.Expectation, self.family.fisher_product, lam, v)

    def inverse_fisher_product(self, lam: Any, v: Any) -> Any:
        return self._fields(self.Natural, self.family.inverse_fisher_product, lam, v)

    def support(self, lam: Any, total: int | None = None) -> Any:
        return self._map(lambda one: self.family.support(one, total), lam)

    def probabilities(self, mu: Any, total: int | None = None) -> Any:
        return self._map(lambda one: self.family.probabilities(one, total), mu)

    def relaxed_sample(
        self, key: Array, lam: Any, temperature: float, shape: tuple[int, ...] = ()
    ) -> Any:
        draw = self.family.relaxed_sample
        return self._map(lambda one, k: draw(k, one, temperature, shape), lam, self._keys(key, lam))

    def gradient(self, lam: Any, g: Any, h: Any) -> Any:
        return self._fields(self.Natural, self.family.gradient, lam, g, h)

    def base_measure_gradient(self, lam: Any) -> Any:
        return self._fields(self.Natural, self.family.base_measure_gradient, lam)

    def retract(self, lam: Any, step: Any, **form: str) -> Any:
        return self._fields(self.Natural, lambda a, b: self.family.retract(a, b, **form), lam, step)

    def safe_step(self, lam: Any, step: Any) -> tuple[Any, Array]:
        treedef, rows = self._rows(lam, step)
        steps = [self.family.safe_step(*row) for row in rows]
        new = _join(self.Natural, treedef, [lam for lam, _ in steps])
        return new, sum((count for _, count in steps), start=jnp.zeros((), jnp.int32))
