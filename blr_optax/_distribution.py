"""The posterior as a value: a family with its natural parameters.

Multiplying densities adds natural parameters, q1 q2 ~ exp(<lambda1 + lambda2, T>), so products,
quotients and powers are exact for any family. They never check: a likelihood site may be improper.
Asking an improper one for a mean, a sample or a density is the error.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._random import canonical_key, leading_shape
from blr_optax._validate import holds, require
from blr_optax.families import Family, MeanField, get

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import ExpectationParameters, KeyLike, NaturalParameters, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distribution:
    """A member of an exponential family: a pytree whose leaves are its natural parameters.

    Attributes:
        family: the family (static).
        natural: lambda, of the family's natural type.
        dtypes: of the weights, leaf by leaf (static), where they are not those of lambda: the
            posterior of a bfloat16 network has float32 parameters and bfloat16 weights. None for
            weights of lambda's own dtype.

    Example:
      >>> import blr_optax as blr
      >>> prior = blr.distribution("normal", mean=0.0, precision=1.0)
      >>> site = blr.distribution("normal", mean=2.0, precision=3.0)
      >>> q = prior * site
      >>> print(q.mean, q.variance, (q / site).mean)
      1.5 0.25 0.0
    """

    family: Family = dataclasses.field(metadata={"static": True})
    natural: NaturalParameters
    dtypes: tuple[Any, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def __new__(cls, *_: Any, **named: Any) -> Self:
        """Refuse standard parameters, which `distribution` takes."""
        if standard := named.keys() - {"family", "natural", "dtypes"}:
            given = ", ".join(f"{name}=..." for name in sorted(standard))
            raise ValueError(
                f"Distribution: {given} are standard parameters, and Distribution(family, natural) "
                f"takes natural ones: blr.distribution(name, {given}) makes one of them."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Catches a name in place of a family; natural may be anything while jax builds trees."""
        if isinstance(self.family, str):
            raise ValueError(
                f"Distribution: family={self.family!r} is a name; give the family itself, "
                f"families.get({self.family!r})."
            )

    @property
    def proper(self) -> Bool[Array, ""]:
        """Whether lambda is in the domain, so that q is a normalisable density."""
        return jnp.all(self.family.in_domain(self.natural))

    def _proper(self, what: str) -> Any:
        """lambda, after an eager check; traced ones go unchecked, `proper` tells."""
        if not holds(self.family.in_domain, self.natural):
            raise ValueError(
                f"Distribution.{what}: the natural parameters are outside the domain of "
                f"{type(self.family).__name__}, so this is no density. A site may be improper: "
                "multiply it by a prior first."
            )
        return self.natural

    def _as_weights(self, theta: PyTree) -> PyTree:
        """Return theta in the dtypes of the weights."""
        if self.dtypes is None:
            return theta
        leaves, treedef = jax.tree.flatten(theta)
        pairs = zip(leaves, self.dtypes, strict=True)
        return treedef.unflatten([x.astype(dtype) for x, dtype in pairs])

    @property
    def mean(self) -> PyTree:
        """E_q[theta]; in its full precision it is among the parameters of `standard`."""
        return self._as_weights(self.family.mean(self._proper("mean")))

    @property
    def variance(self) -> PyTree:
        """Marginal variances."""
        return self.family.variance(self._proper("variance"))

    def standard(self) -> dict[str, PyTree]:
        """Return standard parameters, by name."""
        return self.family.standard(self._proper("standard"))

    def expectation(self) -> ExpectationParameters:
        """mu = E_q[T(theta)]."""
        return self.family.expectation(self._proper("expectation"))

    def sample(self, key: KeyLike, shape: int | tuple[int, ...] = ()) -> PyTree:
        """Draw theta, with leading `shape`; `key` is a typed key or an integer seed."""
        key, shape = canonical_key(key), leading_shape("Distribution.sample", shape)
        theta = self.family.sample(key, self._proper("sample"), shape)
        return self._as_weights(theta)

    def part(self, *path: str | int) -> Distribution:
        """Return the posterior of the weights below a path: keys, attribute names, indices.

        Without what stands elsewhere in the tree, frozen or not: `q.part("head")` is the marginal
        of `theta["head"]`. Families whose marginals are of no known family raise ValueError.

        Example:
          >>> import jax.numpy as jnp, blr_optax as blr
          >>> mean = {"body": jnp.zeros(3), "head": {"w": jnp.ones(2), "b": 0.5}}
          >>> q = blr.distribution("normal", mean=mean, precision=4.0)
          >>> print(q.part("head").mean["w"], q.part("head", "b").mean)
          [1. 1.] 0.5
        """
        if not path:
            raise ValueError('Distribution.part: give a path, such as q.part("head").')
        part = Distribution(*self.family.part(self.natural, path))
        if self.dtypes is None:
            return part
        treedef = jax.tree.structure(jax.eval_shape(self.family.mean, self.natural))
        kept = _tree.subtree(treedef.unflatten(self.dtypes), path, "part")
        return dataclasses.replace(part, dtypes=tuple(jax.tree.leaves(kept)))

    def log_prob(self, theta: PyTree) -> Float[Array, ...]:
        """log q(theta)."""
        return self.family.log_prob(self._proper("log_prob"), theta)

    def cdf(self, theta: PyTree) -> PyTree:
        """P(theta_i <= theta) of every coordinate alone, in the shape of theta.

        Of families whose marginals have a distribution function; others raise ValueError.
        """
        return self.family.cdf(self._proper("cdf"), theta)

    def icdf(self, p: ArrayLike) -> PyTree:
        """Return the quantiles of every coordinate at p: a number, or an array whose axes lead.

        Example:
          >>> import blr_optax as blr
          >>> q = blr.distribution("gamma", concentration=1.0, rate=2.0)  # F(x) = 1 - exp(-2 x)
          >>> print(q.icdf([0.5, 0.95]).round(4), q.cdf(1.0).round(4))
          [0.3466 1.4979] 0.8647
        """
        p = jnp.asarray(p)
        require(
            "Distribution.icdf: p", p, "in [0, 1], a probability", lambda p: (p >= 0) & (p <= 1)
        )
        return self.family.icdf(self._proper("icdf"), p)

    def interval(self, level: float = 0.95) -> tuple[PyTree, PyTree]:
        """Both ends of every coordinate's central interval of probability `level`.

        Example:
          >>> import blr_optax as blr
          >>> low, high = blr.distribution("normal", mean=1.0, variance=4.0).interval()
          >>> print(low.round(2), high.round(2))  # 1 -+ 1.96 * 2
          -2.92 4.92
        """
        if not 0 <= level <= 1:
            raise ValueError(f"Distribution.interval: level={level}; give a fraction, not percent.")
        return self.icdf(0.5 - 0.5 * level), self.icdf(0.5 + 0.5 * level)

    def entropy(self) -> Float[Array, ...]:
        """H(q) in nats."""
        return self.family.entropy(self._proper("entropy"))

    def kl(self, other: Distribution) -> Float[Array, ...]:
        """KL(q || other) in nats."""
        self._same_family(other, "kl")
        return self.family.kl(self._proper("kl"), other._proper("kl"))

    def _same_family(self, other: Any, what: str) -> None:
        if not isinstance(other, Distribution) or other.family != self.family:
            found = other.family if isinstance(other, Distribution) else type(other).__name__
            fix = ""
            if isinstance(self.family, MeanField) or isinstance(found, MeanField):
                fix = (
                    " A MeanField has a member for every number of its parameters: make the other "
                    "one by distribution(q.family, ...), whose arguments are trees like q.mean."
                )
            raise ValueError(
                f"Distribution: {what} needs two members of one family; got {self.family} and "
                f"{found}.{fix}"
            )
        (ours, tree), (theirs, another) = (jax.tree.flatten(x.natural) for x in (self, other))
        if tree != another:
            raise ValueError(
                f"Distribution: {what} needs members over one tree of parameters; their natural "
                f"parameters have shapes {jax.tree.map(jnp.shape, self.natural)} and "
                f"{jax.tree.map(jnp.shape, other.natural)}."
            )
        for a, b in zip(ours, theirs, strict=True):
            try:
                jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
            except ValueError:
                raise ValueError(
                    f"Distribution: {what} needs members of one size; their natural parameters "
                    f"have shapes {jnp.shape(a)} and {jnp.shape(b)}."
                ) from None
        self.family.check_sizes(self.natural, other.natural)

    def __mul__(self, other: Distribution) -> Distribution:
        """Return the (unnormalised) product of two densities: lambda1 + lambda2."""
        self._same_family(other, "*")
        return self._with(self.family.combine((1.0, self.natural), (1.0, other.natural)))

    def __truediv__(self, other: Distribution) -> Distribution:
        """Return the (unnormalised) quotient: lambda1 - lambda2."""
        self._same_family(other, "/")
        return self._with(self.family.combine((1.0, self.natural), (-1.0, other.natural)))

    def __pow__(self, a: float) -> Distribution:
        """Return the (unnormalised) power q^a: a lambda."""
        if isinstance(a, str) or jnp.ndim(a):
            raise ValueError(f"Distribution: the power {a!r} must be one number.")
        return self._with(self.family.combine((a, self.natural)))

    def _with(self, natural: NaturalParameters) -> Distribution:
        return dataclasses.replace(self, natural=natural)


def check_distribution(name: str, given: Any) -> Distribution:
    """Return what is a `Distribution`; raise ValueError for what is not."""
    if isinstance(given, Distribution):
        return given
    plain = isinstance(given, (str, int, float))
    shown = f"{name}={given!r}" if plain else name
    more = ""
    if isinstance(given, (str, Family)):
        more = " A family alone has no parameters."
    elif name == "prior" and (plain or getattr(given, "shape", None) == ()):
        more = " A precision alone is prior_precision=, where that is an argument."
    raise ValueError(
        f"{shown}, of type {type(given).__name__}, must be a Distribution, such as "
        f"distribution('normal', mean=0.0, precision=1.0).{more}"
    )


def distribution(family: str | Family, **standard: PyTree) -> Distribution:
    """Return a distribution, from the name of its family and its standard parameters.

    q(theta) = q_lambda(theta),  lambda = natural(**standard).

    Args:
        family: a registered name (`families.names()`), or a family.
        standard: its standard parameters, such as mean and precision; where one of them is a tree,
            an elementwise family becomes a `MeanField` over that tree.

    Raises:
        ValueError: for an unknown name, and for standard parameters that the family does not have
            or that are out of their range.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> prior = blr.distribution("normal", mean=0.0, precision=4.0)
      >>> print(prior.variance, blr.distribution("gamma", concentration=3.0, rate=2.0).mean)
      0.25 1.5
      >>> q = blr.distribution("normal", mean={"w": jnp.ones(2), "b": 0.0}, precision=4.0)
      >>> print(q.mean["w"], q.entropy().round(3))
      [1. 1.] 2.177
    """
    chosen = get(family)
    # Lists and tuples of numbers are arrays, as for jnp.asarray.
    given = [x for x in standard.values() if x is not None and type(x) not in (list, tuple)]
    if chosen.elementwise and not jax.tree_util.all_leaves(given):
        chosen = MeanField(chosen)
    return Distribution(chosen, chosen.natural(**standard))
