"""mu -> lambda for families without a closed form: a safeguarded Newton solve.

lambda(mu) minimises the convex function A(lambda) - <lambda, mu>. Newton's step is
F(lambda)^{-1} (mu - grad A(lambda)), halved until it stays in the domain and the function falls.
The derivative of the solution is F^{-1}, by the implicit function theorem, never the iterations'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _loops

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree

MAX_NEWTON_STEPS = 200
MAX_HALVINGS = 60


def _symmetric_basis(d: int) -> np.ndarray:
    """Return an orthonormal basis of the symmetric d x d matrices, one flattened matrix per row."""
    rows = []
    for i in range(d):
        for j in range(i + 1):
            e = np.zeros((d, d))
            e[i, j] = e[j, i] = 1.0 if i == j else np.sqrt(0.5)
            rows.append(e.ravel())
    return np.stack(rows)


def coordinates(family: Any, like: PyTree) -> tuple[PyTree, PyTree]:
    """Minimal coordinates of a lambda (or mu): flat vector <-> fields, symmetric where due.

    An orthonormal basis of the symmetric matrices keeps inner products. Batches are flattened.
    """

    def basis(name: str) -> Array:
        field = getattr(like, name)
        return jnp.asarray(_symmetric_basis(field.shape[-1]), field.dtype)

    def to_flat(x: Any) -> Float[Array, " p"]:
        parts = []
        for name, domain in family.domains.items():
            field = jnp.asarray(getattr(x, name))
            if domain.event_ndim == 2:
                field = field.reshape(*field.shape[:-2], -1) @ basis(name).T
            parts.append(field.reshape(-1))
        return jnp.concatenate(parts)

    def to_fields(flat: Float[Array, " p"]) -> Any:
        start, fields = 0, {}
        for name, domain in family.domains.items():
            shape = jnp.shape(getattr(like, name))
            matrix = basis(name) if domain.event_ndim == 2 else None
            inner = shape if matrix is None else (*shape[:-2], matrix.shape[0])
            size = int(np.prod(inner))
            field = flat[start : start + size].reshape(inner)
            fields[name] = field if matrix is None else (field @ matrix).reshape(shape)
            start += size
        return family.Natural(**fields, **{name: getattr(like, name) for name in family.known})

    return to_flat, to_fields


def _solve_one(family: Any, mu: ExpectationParameters) -> tuple[Any, Array]:
    to_flat, to_fields = coordinates(family, mu)
    target = to_flat(mu)
    eps = jnp.finfo(target.dtype).eps

    def residual(x: Array) -> Array:
        return to_flat(family.expectation(to_fields(x))) - target

    def objective(x: Array) -> Array:
        return family.log_partition(to_fields(x)) - x @ target

    def newton(carry: Any) -> Any:
        x, last, steps, _ = carry
        r = residual(x)
        d = -jnp.linalg.solve(jax.jacfwd(residual)(x), r)
        value, slope = objective(x), r @ d

        def too_long(c: Any) -> Any:
            t, halvings = c
            new = x + t * d
            # Close to the solution the function is flat to rounding, and full steps are right.
            slack = 1e-4 * t * slope + 4 * eps * (1 + jnp.abs(value))
            falls = (objective(new) <= value + slack) | (-slope <= jnp.sqrt(eps))
            good = family.in_domain(to_fields(new)) & falls
            return ~good & (halvings < MAX_HALVINGS)

        t, _ = _loops.while_loop(
            too_long, lambda c: (0.5 * c[0], c[1] + 1), (jnp.ones_like(value), 0)
        )
        # -slope / 2 is the distance to the solution, as a KL divergence, and Newton squares it: the
        # last step is one from below eps, or one that rounding keeps from being squared.
        relative = jnp.max(jnp.abs(d)) / (jnp.max(jnp.abs(x)) + jnp.sqrt(eps))
        close = (-slope <= eps) & (relative <= jnp.sqrt(eps))
        stalled = (last <= jnp.sqrt(eps)) & (-slope >= 0.25 * last) & (relative <= eps**0.25)
        return x + t * d, -slope, steps + 1, close | stalled

    def running(carry: Any) -> Any:
        x, _, steps, done = carry
        return ~done & (steps < MAX_NEWTON_STEPS) & jnp.all(jnp.isfinite(x))

    start = to_flat(
        type(mu)(
            **{**mu._asdict(), **{n: d.inside(getattr(mu, n)) for n, d in family.domains.items()}}
        )
    )
    begin = (start, jnp.array(jnp.inf, start.dtype), 0, jnp.array(False))
    x, _, _, done = _loops.while_loop(running, newton, begin)
    converged = done & family.in_domain(to_fields(x))
    return to_fields(jnp.where(converged, x, jnp.nan)), converged


def _fisher_solved(family: Any, lam: NaturalParameters, v: Any) -> Any:
    """F(lambda)^{-1} v of one lambda, of the natural type."""
    to_flat, to_fields = coordinates(family, lam)
    fisher = jax.jacfwd(lambda x: to_flat(family.expectation(to_fields(x))))(to_flat(lam))
    # F is scaled to a unit diagonal, so that fields of different units do not cost digits.
    scale = jax.lax.rsqrt(jnp.diagonal(fisher))
    solved = scale * jnp.linalg.solve(fisher * scale[:, None] * scale, scale * to_flat(v))
    zero = {name: jnp.zeros_like(getattr(lam, name)) for name in family.known}
    return to_fields(solved)._replace(**zero)


def _batch_axes(family: Any, x: Any) -> int:
    return max(jnp.ndim(getattr(x, name)) - d.event_ndim for name, d in family.domains.items())


def solve_fisher(family: Any, lam: NaturalParameters, v: PyTree) -> PyTree:
    """F(lambda)^{-1} v, batched."""
    solve = lambda lam, v: _fisher_solved(family, lam, v)  # noqa: E731
    for _ in range(_batch_axes(family, lam)):
        solve = jax.vmap(solve)
    return solve(lam, v)


def solve_natural(family: Any, mu: ExpectationParameters) -> tuple[PyTree, Array]:
    """(lambda, converged) with grad A(lambda) = mu, batched, differentiable in mu."""

    @jax.custom_jvp
    def solve(mu: ExpectationParameters) -> tuple[Any, Array]:
        return _solve_one(family, mu)

    @solve.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        (mu,), (dmu,) = primals, tangents
        lam, converged = solve(mu)
        still = np.zeros(jnp.shape(converged), jax.dtypes.float0)
        return (lam, converged), (_fisher_solved(family, lam, dmu), still)

    batched: Any = solve
    for _ in range(_batch_axes(family, mu)):
        batched = jax.vmap(batched)
    return batched(mu)
