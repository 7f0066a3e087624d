"""`scale_by_precision` in the eigenbasis of Shampoo's factors: the heart of EVON.

    A, B     averages of G G^T and G^T G          L, R     their eigenvectors, largest first
    X'       L^T X R, for X = G, M, theta - M     s        total precision ess p, in the basis

    theta   <-  M + L ( eps / sqrt(s) ) R^T              in `sample`
    c       <-  s (theta - M)' G'                        curvature, in the basis
    p, U'   <-  scale_by_precision( G', c ) at M'        its state is in the basis
    U       <-  L U' R^T                                 what is passed on
    A, B    <-  beta (A, B) + (1 - beta) (G G^T, G^T G)

and, every so many steps, after the step so that a step has one basis,

    L, R    <-  QR( A L ), QR( B R )                     one power iteration; eigh the first time
    v       <-  O_L^T v O_R,  O = old^T new              the momentum, which is a gradient
    p       <-  (O_L * O_L)^T p (O_R * O_R)              the precision's diagonal in the new basis

The last line is the diagonal q in the new basis that is closest to the old q (least KL(new || old))
and keeps p positive; it also undoes swaps of eigenvectors. The first basis is the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._random import step_key
from blr_optax._validate import is_zero
from blr_optax.families._rotated import (
    Basis,
    Rotated,
    from_basis,
    is_split,
    on_every_device,
    over,
    overlap,
    squared,
    to_basis,
)
from blr_optax.rule import ScaleByPrecisionState, scale_by_precision
from blr_optax.rule._precision import PrecisionRule

if TYPE_CHECKING:
    from jaxtyping import Array


class ScaleByEigenbasisState(NamedTuple):
    """State of EVON: that of `scale_by_precision`, in the basis, and the basis.

    Attributes:
        count, key, ess, prior, skipped: as there.
        rule: static, how samples, curvature and the posterior are read.
        precision: per-example precision p in the basis, a tree like the parameters.
        momentum: state of the average of gradients, in the basis.
        bases: L and R by path of the leaf, for leaves of two axes or more.
        factors: A and B, likewise.
    """

    count: Array
    key: Array
    rule: EigenbasisRule
    precision: Any
    ess: Array
    prior: Any
    momentum: Any
    skipped: Array
    bases: Any
    factors: Any


class EigenbasisRule(PrecisionRule):
    """How a `ScaleByEigenbasisState` is read: `PrecisionRule` in the basis; noise is the same."""

    def weights(self, state: ScaleByEigenbasisState, params: Any, noise: Any) -> Any:
        """theta = M + L (eps / sqrt(ess p)) R^T, formed in float32 or wider."""
        away = over(from_basis, self.displacement(state, noise), state.bases)
        return jax.tree.map(lambda d, m: (m.astype(d.dtype) + d).astype(m.dtype), away, params)

    def displacement(self, state: ScaleByEigenbasisState, noise: Any) -> Any:
        """eps / sqrt(ess p), in the basis."""
        return super().weights(state, jax.tree.map(jnp.zeros_like, state.precision), noise)

    def curvature(
        self, state: ScaleByEigenbasisState, params: Any, weights: Any, grads: Any
    ) -> Any:
        """Per-example curvature in the basis, from the displacement actually made."""
        away = jax.tree.map(
            lambda p, w, m: w.astype(p.dtype) - m.astype(p.dtype), state.precision, weights, params
        )
        grads = jax.tree.map(lambda p, g: g.astype(p.dtype), state.precision, grads)
        turned = (over(to_basis, x, state.bases) for x in (away, grads))
        return self.curvature_in_basis(state, *turned)

    def curvature_in_basis(self, state: ScaleByEigenbasisState, away: Any, grads: Any) -> Any:
        """The same from displacement and gradient in the basis."""
        centre = jax.tree.map(jnp.zeros_like, away)
        return super().curvature(state, centre, away, grads)

    def posterior(self, state: ScaleByEigenbasisState, params: Any) -> Posterior:
        """N(params, 1 / (ess p)) along the axes of the basis."""
        total = jax.tree.map(lambda p: state.ess.astype(p.dtype) * p, state.precision)
        # Copies: the state and the parameters may be donated.
        mean = jax.tree.map(lambda p, m: jnp.array(m, p.dtype), state.precision, params)
        bases = jax.tree.map(jnp.copy, state.bases)
        return Posterior(Rotated(), Rotated().natural(mean=mean, precision=total, bases=bases))


def _first_bases(params: Any, max_size: int) -> Any:
    """Identities for the sides of all leaves of two axes or more, but for sides that are too long.

    The tree without leaves with which `optax.tree.map_params` calls `init` gets one number: it
    stands above whatever the real state has here.
    """
    if not jax.tree.leaves(params):
        return jnp.zeros(())
    bases = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) < 2:
            continue
        columns = leaf.shape[-1]
        sides = [
            jnp.eye(size, dtype=_tree.statistics_dtype(leaf.dtype)) if size <= max_size else None
            for size in (leaf.size // max(columns, 1), columns)
        ]
        bases[_tree.leaf_name(path)] = Basis(*sides)
    return bases


def _gram(g: Array, basis: Basis) -> Basis:
    """G G^T and G^T G of the sides that have a basis."""
    g = (on_every_device(g) if is_split(g) else g).reshape(-1, g.shape[-1])
    return Basis(None if basis.left is None else g @ g.T, None if basis.right is None else g.T @ g)


def _by_eigenvectors(factor: Array, basis: Array) -> Array:
    """Eigenvectors, the largest first: the order that power iterations keep."""
    del basis
    return jnp.linalg.eigh(factor)[1][:, ::-1]


def _by_power(factor: Array, basis: Array) -> Array:
    """One orthogonal iteration, with the signs of the old vectors.

    A rounding's worth of the identity keeps the vectors that the factor sends to zero.
    """
    rounding = jnp.finfo(factor.dtype).eps * jnp.trace(factor)
    q, r = jnp.linalg.qr(factor @ basis + rounding * basis)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype)


def scale_by_eigenbasis(
    ess: Any,
    *,
    b1: Any,
    debias: bool,
    beta: Any,
    weight_decay: Any,
    clip_curvature: float | None,
    refresh_every: int,
    max_size: int,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_precision` with momentum, in a basis that follows the gradients; see `evon`.

    Args:
        ess, weight_decay: as in `scale_by_precision`; one decay per leaf that has a basis.
        b1, debias: of `optax.ema`, the momentum.
        beta: decay of the factors.
        clip_curvature: bound on the curvature's size, in units of p; None for none.
        refresh_every: steps between power iterations.
        max_size: the longest side that gets a basis.
        options: others of `scale_by_precision`.
    """
    inner = scale_by_precision(
        ess, weight_decay=weight_decay, momentum=optax.ema(b1, debias=debias), **options
    )

    def init_fn(params: Any) -> ScaleByEigenbasisState:
        start, bases = inner.init(params), _first_bases(params, max_size)
        if isinstance(bases, dict) and not callable(weight_decay):
            decay = _tree.prefix_leaves(weight_decay, params, "weight_decay")
            for path, d in jax.tree_util.tree_leaves_with_path(decay):
                if jnp.ndim(d) and _tree.leaf_name(path) in bases:
                    raise ValueError(
                        f"weight_decay: its entry for {_tree.leaf_name(path) or 'params'} has "
                        f"shape {jnp.shape(d)}; evon decays along the axes of a basis, so a "
                        "matrix needs one number."
                    )
        rule = EigenbasisRule(start.rule.kind, start.rule.generator)
        return ScaleByEigenbasisState(
            **start._replace(rule=rule)._asdict(),
            bases=bases,
            factors=jax.tree.map(jnp.zeros_like, bases),
        )

    def update_fn(
        updates: Any,
        state: ScaleByEigenbasisState,
        params: Any = None,
        *,
        curvature: Any = None,
        **extra: Any,
    ) -> tuple[Any, ScaleByEigenbasisState]:
        if params is None:
            raise ValueError("evon: update needs params, update(grads, state, params).")
        if not jax.tree.leaves(state.precision):  # an empty group of a partition
            return updates, state
        rule, bases = state.rule, state.bases
        params = rule.part(state, params)
        raw = _tree.matching_leaves(updates, state.precision, "grads")
        raw = jax.tree.map(lambda p, g: g.astype(p.dtype), state.precision, raw)
        grads = over(to_basis, raw, bases)
        if curvature is None:
            noise = rule.noise(state, step_key(state.key, state.count))
            away = rule.displacement(state, noise)
            if jax.tree.map(jnp.result_type, away) != jax.tree.map(jnp.result_type, params):
                weights = rule.weights(state, params, noise)  # rounded to a short dtype
                curvature = rule.curvature(state, params, weights, raw)
            else:
                curvature = rule.curvature_in_basis(state, away, grads)
        else:
            curvature = _tree.matching_leaves(curvature, state.precision, "curvature")
        if clip_curvature is not None:
            curvature = jax.tree.map(
                lambda p, c: jnp.where(
                    jnp.isfinite(c), jnp.clip(c, -clip_curvature * p, clip_curvature * p), c
                ),
                state.precision,
                curvature,
            )
        mean = jax.tree.map(lambda p, m: m.astype(p.dtype), state.precision, params)
        if not is_zero(weight_decay):  # else nothing asks for the mean
            mean = over(to_basis, mean, bases)
        before = ScaleByPrecisionState(*state[: len(ScaleByPrecisionState._fields)])
        out, after = inner.update(grads, before, mean, curvature=curvature, **extra)
        out = jax.tree.map(lambda u, m: u.astype(m.dtype), over(from_basis, out, bases), params)

        finite = after.skipped == state.skipped
        made = state.count - state.skipped
        factors = _averaged(state.factors, raw, bases, beta, finite)
        now = (finite & (made % refresh_every == 0)).astype(jnp.int32)
        moving = (bases, after.precision, after.momentum.ema)
        bases, precision, ema = jax.lax.switch(
            jnp.where(made == 0, 2 * now, now),
            BRANCHES,
            jax.lax.stop_gradient(factors),
            moving,
        )
        bases, factors = jax.tree.map(on_every_device, (bases, factors))
        after = after._replace(precision=precision, momentum=after.momentum._replace(ema=ema))
        return out, ScaleByEigenbasisState(*after, bases=bases, factors=factors)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaged(factors: Any, grads: Any, bases: Any, beta: Any, finite: Array) -> Any:
    """The factors after this gradient; as they were when it is not finite."""
    entries = {_tree.leaf_name(k): g for k, g in jax.tree_util.tree_leaves_with_path(grads)}
    grams = {
        path: _gram(jnp.where(finite, entries[path], 0), basis) for path, basis in bases.items()
    }
    return jax.tree.map(
        lambda a, g: a + (finite * jnp.asarray(1.0 - beta, a.dtype)).astype(a.dtype) * (g - a),
        factors,
        grams,
    )


def _refresh(renew: Any) -> Any:
    """A function (factors, (bases, precision, average)) -> the three in the new basis."""

    def refresh(factors: Any, moving: tuple) -> tuple:
        old, precision, ema = moving
        new = jax.tree.map(renew, factors, jax.lax.stop_gradient(old))
        turn = overlap(old, new)
        return new, over(to_basis, precision, squared(turn)), over(to_basis, ema, turn)

    return refresh


# Made once: what is compiled for one call of `update` outside jit serves the next.
BRANCHES = (lambda _, moving: moving, _refresh(_by_power), _refresh(_by_eigenvectors))
