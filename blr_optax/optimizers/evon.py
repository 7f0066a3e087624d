"""EVON, the online Newton method of a Gaussian in an eigenbasis; and whitening, apart.

    A, B  =  averages of G G^T, G^T G,   L, R  =  their eigenvectors,   X'  =  L^T X R
    Theta =  M + L E' R^T,               E'_ij ~ N( 0, 1 / (ess p_ij) ),  p = h + delta
    C     =  ess p E' G'
    h     <-  b2 h + (1 - b2) C + (1 - b2)^2 (h - C)^2 / (2 p)
    V     <-  b1 V + (1 - b1) G'
    M     <-  M - lr (h_0 + delta) L [ ( V / (1 - b1^t) + delta M' ) / p ] R^T

Minut et al. (2026), SOAP-Bubbles. IVON is the case L = R = I. The authors' code orthogonalises the
bracket as Muon does (`whiten`), after which the step is a natural gradient no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from blr_optax import _tree
from blr_optax._validate import check_positive, check_unit_interval
from blr_optax.estimators._curvature import PerExampleSquares
from blr_optax.families._rotated import is_split, on_every_device, placed_like
from blr_optax.optimizers._eigenbasis import scale_by_eigenbasis
from blr_optax.optimizers.ivon import steps_after

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax.estimators import Curvature


def evon(
    learning_rate: float | Array | Callable,
    ess: float | Array | Callable,
    *,
    hess_init: Any = 1.0,
    b1: Any = 0.95,
    b2: Any = 0.9999,
    shampoo_beta: Any = None,
    weight_decay: Any = 1e-6,
    clip_curvature: float | None = None,
    refresh_every: int = 10,
    max_size: int = 4096,
    rescale_lr: bool = True,
    debias: bool = True,
    curvature: str | Curvature = "reparameterized",
    key: Any = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """EVON: IVON along the eigenvectors of Shampoo's factors, a Gaussian that knows directions.

    p <- p (1 + u + u^2 / 2), u = (1 - b2)(C + delta - p) / p;
    M <- M - lr (h_0 + delta) L [ (V_hat + delta M') / p ] R^T;  q = N(M', 1 / (ess p)) in the
    basis: cov(vec M) = (R (x) L) diag(1 / (ess p)) (R (x) L)^T.

    Take the gradient at `sample(opt_state, params)`, or gradient and curvature (which is along the
    basis) from `estimate`. A leaf with more than two axes is a matrix of its last axis by all
    others; vectors and numbers are IVON's. With `jax.vmap` over states every member refreshes its
    basis in every step, for a condition that differs between members is no saving.

    Args:
        learning_rate: lr, a number or schedule, rescaled by hess_init + weight_decay.
        ess: effective sample size; may be a schedule.
        hess_init: h_0, the first curvature per example. A number or a prefix tree.
        b1: decay of the gradient's average, which turns with the basis.
        b2: decay of the precision.
        shampoo_beta: decay of A and B; b2 by default.
        weight_decay: delta, per example: the prior is N(0, 1 / (ess delta)). A number, a prefix
            tree with one number per matrix, or a schedule.
        clip_curvature: bound on |C| in units of p; None for none.
        refresh_every: steps between power iterations of the basis.
        max_size: a side longer than this keeps the identity as its basis.
        rescale_lr: multiply the learning rate by hess_init + weight_decay, as IVON does.
        debias: divide the gradient's average by 1 - b1^t.
        curvature: "reparameterized" (Price) or `squared_gradient(...)`.
        key: typed key or integer seed.
        generator: "hash" (fast) or "threefry", of the weights' noise.

    Raises:
        ValueError: for arguments out of range, unknown names, trees of another structure, integer
            parameters, and `per_example_squares()`, which are along the weights' own axes.

    Source: Minut et al. (2026), SOAP-Bubbles; the authors do not turn the precision with the basis
    and skip the first step. Special case of `blr_update` with family "gaussian_diagonal" in the
    coordinates of a basis that is held, as `ivon` is.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> a = jnp.array([[2.0, 1.9], [1.9, 2.0]])  # eigenvalues 3.9 and 0.1
      >>> loss, params = lambda w: 0.5 * jnp.sum(w * (a @ w)), jnp.ones((2, 1))
      >>> tx = blr.evon(0.05, ess=100.0, b2=0.99)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(blr.sample(state, params)), state, params)
      ...     return params + updates, state
      >>> for _ in range(3000):
      ...     params, state = step(params, state)
      >>> draws = blr.posterior(state, params).sample(jax.random.key(0), (1000,))[..., 0]
      >>> print(bool(jnp.corrcoef(draws.T)[0, 1] < -0.7))  # -1.9 / 2 is exact
      True
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_unit_interval("b1", b1)
    if shampoo_beta is not None:
        check_unit_interval("shampoo_beta", shampoo_beta)
    if clip_curvature is not None:
        check_positive("clip_curvature", clip_curvature, scalar=True)
    for name, size in (("refresh_every", refresh_every), ("max_size", max_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{name}={size!r} must be a plain integer, at least 1; with inject_hyperparams "
                'name it in static_args=("refresh_every", "max_size").'
            )
    if isinstance(curvature, PerExampleSquares):
        raise ValueError(
            "evon: curvature=per_example_squares() is along the weights' own axes, not along the "
            "basis; use 'reparameterized' or squared_gradient(...)."
        )
    return steps_after(
        scale_by_eigenbasis(
            ess,
            b1=b1,
            debias=debias,
            beta=b2 if shampoo_beta is None else shampoo_beta,
            weight_decay=weight_decay,
            clip_curvature=clip_curvature,
            refresh_every=refresh_every,
            max_size=max_size,
            b2=b2,
            hess_init=hess_init,
            curvature=curvature,
            generator=generator,
            key=key,
        ),
        learning_rate,
        hess_init,
        weight_decay,
        rescale_lr=rescale_lr,
    )


def whiten(steps: int = 5) -> optax.GradientTransformationExtraArgs:
    """Replaces every matrix by the orthogonal matrix near it, as Muon and EVON's authors do.

    U = A S B^T  ->  about A B^T, by Newton and Schulz's iteration: all singular values near one
    (between 0.7 and 1.2). Vectors and numbers pass; more than two axes are flattened as in `evon`.

    It forgets the size of the step, so the learning rate comes after it:
    `optax.chain(blr.evon(1.0, ess), blr.whiten(), optax.scale(lr))`. The mean then no longer takes
    a step of the rule; the precision still does.

    Args:
        steps: of the iteration.

    Raises:
        ValueError: for steps < 1.

    Source: Jordan (2024), Muon, through `optax.contrib.scale_by_muon` without its momentum; Minut
    et al. (2026). Not a special case of `blr_update`: a chain of it with `evon` keeps only the
    precision's step.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, g = blr.whiten(), jnp.array([[3.0, 0.0], [0.0, 0.1]])
      >>> u, _ = tx.update(g, tx.init(g))
      >>> print(bool(jnp.all(jnp.abs(jnp.diag(u) - 1.0) < 0.35)))
      True
    """
    if steps < 1:
        raise ValueError(f"whiten: steps={steps} must be at least 1.")

    def axes(tree: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(lambda x: numbers(tuple(range(x.ndim - 1)), x.ndim - 1), tree)

    muon = optax.contrib.scale_by_muon(
        ns_steps=steps, beta=0.0, nesterov=False, weight_dimension_numbers=axes
    )

    def orthogonal(updates: Any, params: Any = None) -> Any:
        del params

        def widened(u: Array) -> Array:
            u = u.astype(_tree.statistics_dtype(u.dtype))
            return on_every_device(u) if is_split(u) else u

        wide = jax.tree.map(widened, updates)
        out, _ = muon.update(wide, muon.init(wide))  # beta = 0: it keeps nothing between steps
        return jax.tree.map(lambda x, u: placed_like(x.astype(u.dtype), u), out, updates)

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.ndim(x) >= 2, tree)

    return optax.with_extra_args_support(optax.masked(optax.stateless(orthogonal), matrices))
