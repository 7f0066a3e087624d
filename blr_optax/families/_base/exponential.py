"""The exponential family: q(theta) = h(theta) exp(<lambda, T(theta)> - A(lambda)).

    lambda   natural parameters, the state of record          A(lambda)  log-partition
    mu       expectation parameters, E_q[T] = grad A(lambda)  F(lambda)  Fisher matrix, Hess A
    T, h     sufficient statistics and base measure

A family is a frozen dataclass without arrays: a static node of any pytree. What a subclass must
define is listed in `ExponentialFamily`; everything else follows from A by automatic differentiation
and from the declared domains, and is overridden only where a closed form is more accurate or
faster.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax._validate import unwritten
from blr_optax.families._base.domain import Domain
from blr_optax.families._base.family import Family, derived, each_finite
from blr_optax.families._numerics.newton_solve import coordinates, solve_fisher, solve_natural

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree


@dataclasses.dataclass(frozen=True)
class ExponentialFamily(Family):
    """Base of all exponential families.

    A subclass defines the class attributes below, `natural`, `standard`, `sample`, `mean`,
    `variance`, and the methods that raise here: `log_partition`, `sufficient_statistics`,
    `log_base_measure`; and `expected_log_base_measure` unless the base measure is constant. All
    take and return arrays with any leading batch dimensions.

    Attributes:
        Natural: NamedTuple type of lambda (and of natural gradients).
        Expectation: NamedTuple type of mu, with the same fields.
        domains: the domain of each learnt field of lambda.
        known: fields of lambda that are given and never move (a known covariance, a total).
        event_ndim: number of trailing axes of theta that are one event.
        joint: whether theta is a NamedTuple of parts (mean and precision, say), not one array.
        location: whether `natural_at` can centre the family at a point.
        constant_base_measure: whether h does not depend on theta.
        reparameterized: whether samples carry exact gradients in lambda.
        enumerable: whether there are few values of theta, which `support` lists.
        relaxable: whether `relaxed_sample` exists.
    """

    Expectation: ClassVar[type]
    domains: ClassVar[dict[str, Domain]]
    exponential: ClassVar[bool] = True
    known: ClassVar[tuple[str, ...]] = ()
    joint: ClassVar[bool] = False
    constant_base_measure: ClassVar[bool] = True
    reparameterized: ClassVar[bool] = True
    enumerable: ClassVar[bool] = False
    relaxable: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give `log_partition` a derivative rule that returns mu (known fields: autodiff)."""
        super().__init_subclass__(**kwargs)
        if "log_partition" not in cls.__dict__ or cls.known:
            return
        plain = cls.log_partition
        ruled = jax.custom_jvp(plain, nondiff_argnums=(0,))

        @ruled.defjvp
        def _(self: ExponentialFamily, primals: Any, tangents: Any) -> Any:
            (lam,), (dlam,) = primals, tangents
            return ruled(self, lam), self.inner(dlam, self.expectation(lam))

        cls.plain_log_partition = plain
        cls.log_partition = functools.wraps(plain)(lambda self, lam: ruled(self, lam))

    # What a family says about itself.

    def log_partition(self, lam: NaturalParameters) -> Float[Array, ...]:
        """A(lambda), one number per batch element; its derivative is mu."""
        raise unwritten(self, "log_partition(self, lam)")

    def sufficient_statistics(
        self, theta: PyTree, lam: NaturalParameters = None
    ) -> ExpectationParameters:
        """T(theta), in the expectation type; lambda is passed for what is known of it."""
        raise unwritten(self, "sufficient_statistics(self, theta, lam=None)")

    def log_base_measure(self, lam: NaturalParameters, theta: PyTree) -> Float[Array, ...]:
        """log h(theta); lambda is passed for its known fields only."""
        raise unwritten(self, "log_base_measure(self, lam, theta)")

    def support(self, lam: NaturalParameters, total: int | None = None) -> Array:
        """All values of theta, along a new leading axis; `enumerable` families.

        `total` is the known one of counts, where that is traced.
        """
        raise unwritten(self, "support(self, lam, total=None)")

    def probabilities(self, mu: ExpectationParameters, total: int | None = None) -> Array:
        """Return the probabilities of `support`, along a new leading axis, as polynomials of mu."""
        raise unwritten(self, "probabilities(self, mu, total=None)")

    def relaxed_sample(
        self, key: Array, lam: NaturalParameters, temperature: float, shape: tuple[int, ...] = ()
    ) -> Array:
        """Draws of a continuous relaxation, differentiable in lambda; `relaxable` families."""
        raise unwritten(self, "relaxed_sample(self, key, lam, temperature, shape=())")

    def expected_log_base_measure(self, lam: NaturalParameters) -> Float[Array, ...]:
        """E_q[log h(theta)]; the constant itself unless h depends on theta."""
        if not self.constant_base_measure:
            raise unwritten(self, "expected_log_base_measure(self, lam)")
        return self.log_base_measure(lam, self.mean(lam))

    # What follows.

    @derived
    def elementwise(self) -> bool:
        """Whether lambda, mu and theta are arrays of one shape, so that `MeanField` can lift it."""
        events = (d.event_ndim for d in self.domains.values())
        return not (self.joint or self.event_ndim or any(events))

    def inner(self, a: PyTree, b: PyTree) -> Float[Array, ...]:
        """Return <a, b> over the learnt fields, one number per batch element."""
        return sum(
            jnp.sum(getattr(a, name) * getattr(b, name), axis=tuple(range(-d.event_ndim, 0)))
            for name, d in self.domains.items()
        )

    def combine(self, *terms: tuple[PyTree, PyTree]) -> NaturalParameters:
        """sum_k a_k lambda_k over the learnt fields; known fields are the first term's."""
        self.check_sizes(*(lam for _, lam in terms))
        total = jax.tree.map(
            lambda *leaves: sum(a * leaf for (a, _), leaf in zip(terms, leaves, strict=True)),
            *(lam for _, lam in terms),
        )
        return total._replace(**{name: getattr(terms[0][1], name) for name in self.known})

    def check_sizes(self, *lams: NaturalParameters) -> None:
        """Raise ValueError where vectors or matrices would broadcast, as a sum of lambdas does."""
        events = {name: d.event_ndim for name, d in self.domains.items() if d.event_ndim}
        for name, ndim in events.items():
            shapes = [jnp.shape(getattr(lam, name)) for lam in lams]
            if len({shape[len(shape) - ndim :] for shape in shapes}) > 1:
                raise ValueError(
                    f"{type(self).__name__}: the members have different sizes; their natural "
                    f"parameters `{name}` have shapes {', '.join(map(str, shapes))}."
                )

    def coordinates(self, like: PyTree) -> tuple[PyTree, PyTree]:
        """Minimal coordinates of the learnt fields: (fields -> flat vector, and back)."""
        return coordinates(self, like)

    def _cotangent(self, kind: type, gradient: Any) -> Any:
        """Return a gradient by autodiff in another type: symmetric where due, zero where known."""

        def field(name: str) -> Any:
            x = getattr(gradient, name)
            if name in self.known:
                return jax.tree.map(jnp.zeros_like, x)
            if self.domains[name].event_ndim == 2:
                return 0.5 * (x + jnp.swapaxes(x, -1, -2))
            return x

        return kind(**{name: field(name) for name in self.Natural._fields})

    def gradient_in_mu(self, gradient: PyTree) -> NaturalParameters:
        """Return a gradient in mu as the natural gradient that it is, of the natural type."""
        return self._cotangent(self.Natural, gradient)

    def gradient_in_lambda(self, lam: NaturalParameters, gradient: PyTree) -> NaturalParameters:
        """Return a gradient in lambda turned into the natural gradient: F(lambda)^{-1} times it.

        It is zero for a member whose F has no inverse in this arithmetic, such as a sign that is
        certain to its last digit: draws say nothing about it, and only its prior moves it.
        """
        v = self._cotangent(self.Expectation, gradient)
        found = self.inverse_fisher_product(lam, v)
        like = self.in_domain(lam)
        # A product that overflows is another matter: such a step is skipped, and counted.
        fields = {name: getattr(v, name) for name in self.domains}
        ordinary = {k: jnp.square(x) for k, x in fields.items()}
        blind = each_finite(ordinary, like) & ~each_finite(found, like)

        def known(x: Array) -> Array:
            return jnp.where(jnp.expand_dims(blind, tuple(range(blind.ndim, x.ndim))), 0.0, x)

        return jax.tree.map(known, found)

    def centred(self, lam: NaturalParameters) -> tuple[NaturalParameters, Callable, Callable]:
        """Return a translated member whose natural gradients cancel nowhere: its own, unless known.

        Returns:
            (lambda_0, away, back): theta = away(theta_0) for draws theta_0 of lambda_0, and
            back(n_0) is the natural gradient under lambda for n_0, that under lambda_0.
        """
        return lam, lambda theta: theta, lambda n: n

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        """mu = grad A(lambda) over the learnt fields; known ones pass through."""
        plain = getattr(type(self), "plain_log_partition", type(self).log_partition)
        learnt = {name: getattr(lam, name) for name in self.domains}
        gradient = jax.grad(lambda x: jnp.sum(plain(self, lam._replace(**x))))(learnt)
        return self.Expectation(**gradient, **{name: getattr(lam, name) for name in self.known})

    def natural_from_expectation(
        self, mu: ExpectationParameters, with_status: bool = False
    ) -> PyTree:
        """lambda(mu), by a safeguarded Newton solve; its derivative is F^{-1}.

        Args:
            mu: expectation parameters.
            with_status: also return whether the solve converged, per batch element.

        Returns:
            lambda, or (lambda, converged). Where it did not converge lambda is NaN, never a guess.
        """
        lam, converged = solve_natural(self, mu)
        return (lam, converged) if with_status else lam

    def log_prob(self, lam: NaturalParameters, theta: PyTree) -> Float[Array, ...]:
        """log q(theta) = <lambda, T(theta)> - A(lambda) + log h(theta), with 0 log 0 = 0."""
        t = self.sufficient_statistics(theta, lam)
        none = lambda a, x: jnp.where((a == 0) & jnp.isinf(x), 0.0, x)  # noqa: E731
        kept = {n: jax.tree.map(none, getattr(lam, n), getattr(t, n)) for n in self.domains}
        exponent = self.inner(lam, t._replace(**kept))
        return exponent - self.log_partition(lam) + self.log_base_measure(lam, theta)

    def entropy(self, lam: NaturalParameters) -> Float[Array, ...]:
        """H(q) = A(lambda) - <lambda, mu> - E_q[log h]."""
        exponent = self.inner(lam, self.expectation(lam))
        return self.log_partition(lam) - exponent - self.expected_log_base_measure(lam)

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Float[Array, ...]:
        """KL(p || q) = A(lambda_q) - A(lambda_p) - <lambda_q - lambda_p, mu_p>."""
        move = self.combine((1.0, lam_q), (-1.0, lam_p))
        gap = self.log_partition(lam_q) - self.log_partition(lam_p)
        return gap - self.inner(move, self.expectation(lam_p))

    def fisher_product(self, lam: NaturalParameters, v: PyTree) -> ExpectationParameters:
        """F(lambda) v, the change of mu along v (matrix fields: v symmetric); zero where known."""
        learnt, along = ({n: getattr(x, n) for n in self.domains} for x in (lam, v))

        def mu(x: Any) -> Any:
            found = self.expectation(lam._replace(**x))
            return {name: getattr(found, name) for name in self.domains}

        change = jax.jvp(mu, (learnt,), (along,))[1]
        zero = {name: jnp.zeros_like(getattr(lam, name)) for name in self.known}
        return self.Expectation(**change, **zero)

    def inverse_fisher_product(self, lam: NaturalParameters, v: PyTree) -> NaturalParameters:
        """F(lambda)^{-1} v: a gradient in lambda as the natural gradient, which is one in mu.

        Args:
            lam: natural parameters.
            v: of the expectation type, like a gradient in lambda (matrix fields symmetric).

        Returns:
            Natural type; zero where known.
        """
        return solve_fisher(self, lam, v)

    def fisher(self, lam: NaturalParameters) -> Float[Array, "... p p"]:
        """F(lambda) over the flattened learnt fields, in their order; batches through vmap.

        A matrix field enters entry by entry and F maps the antisymmetric part to zero.
        """
        batch = jnp.shape(self.log_partition(lam))
        if batch:
            inner = jax.tree.map(lambda x: jnp.broadcast_to(x, batch + x.shape[len(batch) :]), lam)
            return jax.vmap(self.fisher)(inner)
        flat, unravel = jax.flatten_util.ravel_pytree([getattr(lam, name) for name in self.domains])

        def symmetric(name: str, v: Any) -> Any:
            return 0.5 * (v + v.T) if self.domains[name].event_ndim == 2 else v

        def column(e: Array) -> Array:
            pairs = zip(self.domains, unravel(e), strict=True)
            zero = jax.tree.map(jnp.zeros_like, lam)
            v = zero._replace(**{name: symmetric(name, x) for name, x in pairs})
            change = self.fisher_product(lam, v)
            return jax.flatten_util.ravel_pytree([getattr(change, k) for k in self.domains])[0]

        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))

    def in_domain(self, lam: NaturalParameters) -> Bool[Array, ...]:
        """Whether lambda is a proper member, per batch element."""
        checks = [d.contains(getattr(lam, name)) for name, d in self.domains.items()]
        return functools.reduce(jnp.logical_and, checks)

    def retract(self, lam: NaturalParameters, step: PyTree) -> NaturalParameters:
        """lambda + step to first order, inside the domain for any finite step."""
        return lam._replace(
            **{
                name: d.retract(getattr(lam, name), getattr(step, name))
                for name, d in self.domains.items()
            }
        )

    def safe_step(self, lam: NaturalParameters, step: PyTree) -> tuple[PyTree, Array]:
        """Return the plain step where it stays in the domain, `retract` where it would not.

        Returns:
            The new lambda, and how many batch elements were retracted (int32).
        """
        plain = self.combine((1.0, lam), (1.0, step))
        inside = self.in_domain(plain)
        for name, d in self.domains.items():
            inside &= d.sound(getattr(plain, name)) if d.event_ndim == 2 else True
        retracted = self.retract(lam, step)

        def choose(name: str) -> Array:
            ndim = self.domains[name].event_ndim
            where = jnp.expand_dims(inside, tuple(range(-ndim, 0)))
            return jnp.where(where, getattr(plain, name), getattr(retracted, name))

        chosen = plain._replace(**{name: choose(name) for name in self.domains})
        return chosen, jnp.sum(~inside, dtype=jnp.int32)

    def base_measure_gradient(self, lam: NaturalParameters) -> NaturalParameters:
        """grad_mu E_q[log h], in the natural type; zero when h is constant."""
        if self.constant_base_measure:
            return jax.tree.map(jnp.zeros_like, lam)
        mu = self.expectation(lam)
        gradient = jax.grad(
            lambda m: jnp.sum(self.expected_log_base_measure(self.natural_from_expectation(m)))
        )(mu)
        return self.Natural(*gradient)
