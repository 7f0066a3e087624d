"""The root of all families: a set of densities q_lambda(theta), with its parameters lambda.

A family is a frozen dataclass without arrays, a static node of any pytree. What a posterior is
asked for is here: draws, densities, moments. How it is learnt is in the two bases on top of this
one, `exponential` and `conditional`; a family of this base alone is only read.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class Family:
    """Base of all families.

    A subclass defines the class attribute `Natural` and the methods that raise
    `NotImplementedError` here; `entropy` and `kl` where they are known, and `join` where members
    over disjoint leaves of one tree can be one. All take and return arrays with any leading batch
    dimensions, or trees.

    Attributes:
        Natural: NamedTuple type of the parameters.
        event_ndim: number of trailing axes of theta that are one event.
        location: whether `natural_at` can centre a member at a point.
        exponential: whether lambda has arithmetic and a map to mu, see `exponential`.
        conditional: whether it is learnt block by block, see `conditional`.
    """

    Natural: ClassVar[type]
    event_ndim: ClassVar[int] = 0
    location: ClassVar[bool] = False
    exponential: ClassVar[bool] = False
    conditional: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the family a static node of any pytree."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def check_learnable(self, who: str) -> None:
        """Raise ValueError for a family that the rule does not learn."""
        if not (self.exponential or self.conditional):
            raise ValueError(
                f"{who}: {type(self).__name__} is a posterior to read; what learns it is its own "
                "optimizer. Learn a family of `families.names()` in its place, started at "
                "q.mean and q.variance."
            )

    def natural(self, **standard: Any) -> Any:
        """Return lambda, from standard parameters (keywords)."""
        raise NotImplementedError

    def standard(self, lam: Any) -> dict[str, Any]:
        """Return the standard parameters of lambda; `natural(**standard(lam))` is lambda."""
        raise NotImplementedError

    def sample(self, key: Array, lam: Any, shape: tuple[int, ...] = ()) -> Any:
        """Draw theta, with leading `shape`."""
        raise NotImplementedError

    def log_prob(self, lam: Any, theta: Any) -> Float[Array, ...]:
        """Evaluate log q(theta)."""
        raise NotImplementedError

    def mean(self, lam: Any) -> Any:
        """Return E_q[theta]."""
        raise NotImplementedError

    def variance(self, lam: Any) -> Any:
        """Return the marginal variance of every coordinate of theta."""
        raise NotImplementedError

    def in_domain(self, lam: Any) -> Bool[Array, ...]:
        """Tell whether lambda is a proper member, per batch element."""
        raise NotImplementedError

    def natural_at(self, location: Any, like: Any = None) -> Any:
        """Return a lambda centred at `location`, with the scale of `like` (else one)."""
        raise ValueError(f"{type(self).__name__} has no location: pass init=.")

    def entropy(self, lam: Any) -> Float[Array, ...]:
        """Return H(q) in nats, where it is known."""
        raise ValueError(
            f"{type(self).__name__} has no entropy in closed form: average -log_prob over samples."
        )

    def kl(self, lam_p: Any, lam_q: Any) -> Float[Array, ...]:
        """Return KL(p || q) in nats, where it is known."""
        raise ValueError(
            f"{type(self).__name__} has no KL divergence in closed form: average the difference of "
            "log_prob over samples of p."
        )

    def join(self, lam: Any, other: Family, other_lam: Any) -> tuple[Family, Any] | None:
        """Return one member over the leaves of two, or None where no family holds both.

        Args:
            lam: parameters over some leaves of a tree, `MaskedNode` elsewhere.
            other: the family of the second member.
            other_lam: its parameters, over other leaves of the same tree.
        """
        return None

    def combine(self, *terms: tuple[Any, Any]) -> Any:
        """Refuse: only exponential families have arithmetic."""
        raise ValueError(
            f"{type(self).__name__} is no exponential family: a product of two of its densities "
            "is not one of them, so natural parameters have no arithmetic."
        )

    def check_sizes(self, *lams: Any) -> None:
        """Raise ValueError where members have different sizes, as a sum of lambdas does."""

    def expectation(self, lam: Any) -> Any:
        """Refuse: only exponential families have expectation parameters."""
        raise ValueError(
            f"{type(self).__name__} is no exponential family: it has no expectation parameters. "
            "Moments are mean(lam) and variance(lam)."
        )
