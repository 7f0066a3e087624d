"""EVON, the online Newton method of a Gaussian in an eigenbasis; and whitening, apart.

    A, B  =  averages of G G^T, G^T G,   L, R  =  their eigenvectors,   X'  =  L^T X R
    Theta =  M + L E' R^T,               E'_ij ~ N( 0, 1 / (ess p_ij) ),  p = h + delta
    C     =  ess p E' G'
    h     <-  b2 h + (1 - b2) C + (1 - b2)^2 (h - C)^2 / (2 p)
    V     <-  b1 V + (1 - b1) G'
    M     <-  M - lr (h_0 + delta) L [ ( V / (1 - b1^t) + delta M' ) / p ] R^T

Minut et al. (2026), SOAP-Bubbles. IVON is the case L = R = I. The authors' code orthogonalises the
bracket as Muon does (`orthogonalize`), after which the step is a natural gradient no more.

`scale_by_eigenbasis` is `scale_by_precision` in that basis:

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

Above 500 lines, since the basis and the Gaussian along it are one state, and a fifth of the file is
the contract of `evon` and `orthogonalize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from blr_optax import _loops, _tree
from blr_optax._decay import decay_leaves, masked, moves
from blr_optax._distribution import Distribution
from blr_optax._rounding import widening
from blr_optax._transformation import transformation
from blr_optax._validate import (
    check_count,
    check_positive,
    check_unit_interval,
    finite_and_square,
    is_zero,
)
from blr_optax.estimators._curvature import PerExampleSquares, from_name
from blr_optax.optimizers._first_weights import (
    GivenRun,
    RelativeNoise,
    RelativePrior,
    from_first_weights,
    of_run,
    prior_of,
)
from blr_optax.optimizers._posteriors.rotated import (
    Basis,
    Rotated,
    beside,
    by_eigenvectors,
    by_power,
    from_basis,
    on_every_device,
    over,
    overlap,
    placed_like,
    squared,
    to_basis,
)
from blr_optax.optimizers.ivon import steps_after
from blr_optax.rule import ScaleByPrecisionState, scale_by_precision
from blr_optax.rule._spikes import CLIP_SPIKES, shorten, times
from blr_optax.state._reader import OuterReader
from blr_optax.state._reading import noise_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import (
        Hyperparameter,
        KeyLike,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
        Updates,
    )
    from blr_optax.estimators import Curvature


class ScaleByEigenbasisState(NamedTuple):
    """State of EVON: that of `scale_by_precision`, in the basis, and the basis.

    Attributes:
        reader: static, how samples, curvature and the posterior are read.
        gaussian: state of `scale_by_precision`, its precision and momentum in the basis.
        bases: L and R by path of the leaf, for leaves of two axes or more.
        factors: A and B, likewise.
    """

    reader: EigenbasisReader
    gaussian: ScaleByPrecisionState
    bases: PyTree
    factors: PyTree


class EigenbasisReader(OuterReader):
    """How a `ScaleByEigenbasisState` is read: as its Gaussian, along the axes of the basis."""

    inside = "gaussian"

    def weights(self, state: ScaleByEigenbasisState, params: Params, noise: PyTree) -> PyTree:
        """theta = M + L (eps / sqrt(ess p)) R^T, formed in float32 or wider.

        In a dtype below float32 the noise is wider, see `_rounding`: along turned axes by the
        spacing of the leaf's largest weight.
        """
        drawn = self.displacement(state, noise)
        drawn = jax.tree.map(jnp.multiply, drawn, self.widened(state, params))
        moved = over(from_basis, drawn, state.bases)
        return jax.tree.map(lambda d, m: (m.astype(d.dtype) + d).astype(m.dtype), moved, params)

    def displacement(self, state: ScaleByEigenbasisState, noise: PyTree) -> PyTree:
        """eps / sqrt(ess p), in the basis."""
        origin = optax.tree.zeros_like(state.gaussian.precision)
        return super().weights(state, origin, noise)

    def widened(self, state: ScaleByEigenbasisState, params: Params) -> PyTree:
        """Return k >= 1, by which `displacement` is multiplied."""
        gaussian = state.gaussian

        def leaf(path: Any, s: Array, m: Array) -> Array | float:
            if not gaussian.reader.by_displacement:
                return 1.0
            return widening(jax.lax.rsqrt(s), m, whole=_tree.leaf_name(path) in state.bases)

        total = gaussian.reader.total_precision(gaussian)
        return jax.tree_util.tree_map_with_path(leaf, total, params)

    def statistic(
        self,
        state: ScaleByEigenbasisState,
        params: Params,
        weights: PyTree,
        grads: Updates,
        noise: PyTree,
    ) -> PyTree:
        """Per-example curvature in the basis, from the noise; the gradient is in no basis."""
        del weights
        grads = optax.tree.cast_like(grads, state.gaussian.precision)
        return self.statistic_in_basis(state, params, over(to_basis, grads, state.bases), noise)

    def statistic_in_basis(
        self, state: ScaleByEigenbasisState, params: Params, grads: Updates, noise: PyTree
    ) -> PyTree:
        """Return the same from a gradient in the basis."""
        drawn = self.displacement(state, noise)
        measuring = jax.tree.map(lambda d, k: d / k, drawn, self.widened(state, params))
        return self.curvature(state, optax.tree.zeros_like(measuring), measuring, grads)

    def posterior(self, state: ScaleByEigenbasisState, params: Params) -> Distribution:
        """N(params, 1 / (ess p)) along the axes of the basis."""
        gaussian = state.gaussian
        total = gaussian.reader.total_precision(gaussian)
        # Copies: the state and the parameters may be donated.
        mean = jax.tree.map(lambda p, m: jnp.array(m, p.dtype), gaussian.precision, params)
        bases = jax.tree.map(jnp.copy, state.bases)
        return Distribution(Rotated(), Rotated().natural(mean=mean, precision=total, bases=bases))


def _first_bases(params: Params, max_size: int) -> Any:
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
        dtype = _tree.statistics_dtype(leaf.dtype)
        sides = [
            beside(jnp.eye(size, dtype=dtype), leaf) if size <= max_size else None
            for size in (leaf.size // max(columns, 1), columns)
        ]
        bases[_tree.leaf_name(path)] = Basis(*sides)
    return bases


def _gram(g: Array, basis: Basis) -> Basis:
    """G G^T and G^T G of the sides that have a basis."""
    g = (on_every_device(g) if _tree.is_split(g) else g).reshape(-1, g.shape[-1])
    return Basis(None if basis.left is None else g @ g.T, None if basis.right is None else g.T @ g)


def scale_by_eigenbasis(
    ess: ScalarOrSchedule,
    *,
    b1: Scalar,
    debias: bool,
    beta: Scalar,
    weight_decay: Hyperparameter,
    clip_curvature: float | None,
    refresh_every: int,
    max_size: int,
    clip_spikes: Scalar | None,
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
        clip_spikes: as in `scale_by_precision`.
        options: others of `scale_by_precision`.
    """
    inner: Any = scale_by_precision(
        ess=ess,
        weight_decay=weight_decay,
        momentum=optax.ema(b1, debias=debias),
        clip_spikes=clip_spikes,
        **options,
    )
    reader = EigenbasisReader()

    def init_fn(params: Params) -> ScaleByEigenbasisState:
        bases = _first_bases(params, max_size)
        if isinstance(bases, dict) and not moves(weight_decay):
            decay = decay_leaves(weight_decay, params, 0)
            for path, d in jax.tree_util.tree_leaves_with_path(decay):
                if jnp.ndim(d) and _tree.leaf_name(path) in bases:
                    raise ValueError(
                        f"weight_decay: its entry for {_tree.leaf_name(path) or 'params'} has "
                        f"shape {jnp.shape(d)}; evon decays along the axes of a basis, so a "
                        "matrix needs one number."
                    )
        return ScaleByEigenbasisState(
            reader=reader,
            gaussian=inner.init(params),
            bases=bases,
            factors=jax.tree.map(jnp.zeros_like, bases),
        )

    def update_fn(
        updates: Updates,
        state: ScaleByEigenbasisState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, ScaleByEigenbasisState]:
        if params is None:
            raise ValueError("evon: update needs params, update(grads, state, params).")
        gaussian, bases = state.gaussian, state.bases
        if not jax.tree.leaves(gaussian.precision):  # an empty group of a partition
            return updates, state
        params = reader.part(state, params)
        raw = _tree.matching_leaves(updates, gaussian.precision, "grads")
        raw = optax.tree.cast_like(raw, gaussian.precision)
        grads = over(to_basis, raw, bases)
        if statistic is None:
            statistic = reader.statistic_in_basis(state, params, grads, noise_of(state))
        else:
            statistic = _tree.matching_leaves(statistic, gaussian.precision, "statistic")
        if clip_curvature is not None:
            statistic = _clipped(statistic, clip_curvature, gaussian.precision)
        mean = optax.tree.cast_like(params, gaussian.precision)
        if not is_zero(weight_decay):  # else nothing asks for the mean
            mean = over(to_basis, mean, bases)
        out, after = inner.update(grads, gaussian, mean, statistic=statistic, **extra)
        out = optax.tree.cast_like(over(from_basis, out, bases), params)

        finite = after.skipped == gaussian.skipped
        made = gaussian.count - gaussian.skipped
        short, _ = shorten(gaussian.spikes, clip_spikes, finite_and_square(raw)[1], finite)
        factors = _averaged(state.factors, times(short, raw), bases, beta, finite)
        now = (finite & (made % refresh_every == 0)).astype(jnp.int32)
        moving = (bases, after.precision, after.momentum.ema)
        given = _loops.together((jax.lax.stop_gradient(factors), moving))
        which = jnp.where(made == 0, 2 * now, now)
        bases, precision, ema = jax.lax.switch(which, BRANCHES, *given)
        bases, factors = jax.tree.map(on_every_device, (bases, factors))
        after = after._replace(precision=precision, momentum=after.momentum._replace(ema=ema))
        return out, ScaleByEigenbasisState(reader, after, bases, factors)

    return transformation(init_fn, update_fn)


def _clipped(curvature: Any, bound: Any, precision: Any) -> Any:
    """Clip the curvature between -bound p and bound p; entries that are not finite stay."""

    def leaf(c: Array, p: Array) -> Array:
        return jnp.where(jnp.isfinite(c), jnp.clip(c, -bound * p, bound * p), c)

    return jax.tree.map(leaf, curvature, precision)


def _averaged(factors: Any, grads: Updates, bases: Any, beta: Scalar, finite: Array) -> Any:
    """Return the factors after this gradient; as they were when it is not finite."""
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
    """Return a function (factors, (bases, precision, average)) -> the three in the new basis."""

    def refresh(factors: Any, moving: tuple) -> tuple:
        old, precision, ema = moving
        new = jax.tree.map(renew, factors, jax.lax.stop_gradient(old))
        turn = overlap(old, new)
        return new, over(to_basis, precision, squared(turn)), over(to_basis, ema, turn)

    return refresh


# Made once: what is compiled for one call of `update` outside jit serves the next.
BRANCHES = (lambda _, moving: moving, _refresh(by_power), _refresh(by_eigenvectors))


def evon(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    ess: ScalarOrSchedule,
    num_steps: int | None = None,
    hess_init: Hyperparameter | RelativeNoise = None,
    b1: Scalar = 0.95,
    b2: Scalar | None = None,
    shampoo_beta: Scalar | None = None,
    weight_decay: Hyperparameter = None,
    prior_precision: Hyperparameter = None,
    mask: PyTree | Callable[[Params], PyTree] = None,
    prior: RelativePrior | None = None,
    clip_curvature: float | None = None,
    clip_step: Scalar | None = None,
    refresh_every: int = 10,
    max_size: int = 4096,
    rescale_lr: bool = True,
    debias: bool = True,
    curvature: str | Curvature = "reparameterized",
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
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
        num_steps: of the whole run, from which what is not given follows, as in `ivon`.
        hess_init: h_0, the first curvature per example. A number, a prefix tree, or
            `relative_noise(0.2)`; 1 by default.
        b1: decay of the gradient's average, which turns with the basis.
        b2: decay of the precision; 0.9999 by default.
        shampoo_beta: decay of A and B; b2 by default.
        weight_decay: delta, per example: the prior is N(0, 1 / (ess delta)). A number, a prefix
            tree with one number per matrix, or a schedule; 1e-6 by default.
        prior_precision: the same prior by its total precision, ess * delta, in place of
            weight_decay; a number or prefix tree.
        mask: which leaves decay, as in `ivon`.
        prior: `relative_prior(3.2)`, in place of a weight_decay.
        clip_curvature: bound on |C| in units of p; None for none.
        clip_step: bound on the step of every weight, as in `ivon`.
        refresh_every: steps between power iterations of the basis.
        max_size: a side longer than this keeps the identity as its basis.
        rescale_lr: multiply the learning rate by hess_init + weight_decay, as IVON does.
        debias: divide the gradient's average by 1 - b1^t.
        curvature: "reparameterized" (Price) or `squared_gradient(...)`.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise.

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
    if isinstance(from_name(curvature), PerExampleSquares):
        raise ValueError(
            "evon: curvature=per_example_squares() is along the weights' own axes, not along the "
            "basis; use 'reparameterized' or squared_gradient(...)."
        )
    if prior is not None and not isinstance(prior, RelativePrior):
        raise ValueError(
            f"evon: prior={prior!r} must be relative_prior(...); another strength goes into "
            "weight_decay= or prior_precision=."
        )
    run = of_run(
        "evon",
        num_steps,
        GivenRun(learning_rate, b2, hess_init, prior, clip_step),
        GivenRun(None, 0.9999, 1.0, None, None),
        has_prior=weight_decay is not None or prior_precision is not None,
    )
    decay = prior_of("evon", run.prior, weight_decay, prior_precision, ess, default=1e-6).strength

    def make(hess_init: PyTree, decay: PyTree) -> optax.GradientTransformationExtraArgs:
        decay = masked(decay, mask)
        return steps_after(
            scale_by_eigenbasis(
                ess,
                b1=b1,
                debias=debias,
                beta=run.b2 if shampoo_beta is None else shampoo_beta,
                weight_decay=decay,
                clip_curvature=clip_curvature,
                refresh_every=refresh_every,
                max_size=max_size,
                b2=run.b2,
                hess_init=hess_init,
                curvature=curvature,
                clip_spikes=clip_spikes,
                generator=generator,
                key=key,
            ),
            run.learning_rate,
            hess_init,
            decay,
            ess=ess,
            clip_step=run.clip_step,
            rescale_lr=rescale_lr,
        )

    return from_first_weights(make, run.noise, decay, ess, (1.0, 1.0), mask=mask)


def orthogonalize(steps: int = 5) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix by the orthogonal matrix near it, as Muon and EVON's authors do.

    U = A S B^T  ->  about A B^T, by Newton and Schulz's iteration: all singular values near one
    (between 0.7 and 1.2). Vectors and numbers pass; more than two axes are flattened as in `evon`.

    It forgets the size of the step, so the learning rate comes after it:
    `optax.chain(blr.evon(1.0, ess=n), blr.orthogonalize(), optax.scale(lr))`. The mean then no
    longer takes a step of the rule; the precision still does.

    Args:
        steps: of the iteration.

    Raises:
        ValueError: for steps < 1.

    Source: Jordan (2024), Muon, through `optax.contrib.scale_by_muon` without its momentum; Minut
    et al. (2026). Not a special case of `blr_update`: a chain of it with `evon` keeps only the
    precision's step.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, g = blr.orthogonalize(), jnp.array([[3.0, 0.0], [0.0, 0.1]])
      >>> u, _ = tx.update(g, tx.init(g))
      >>> print(bool(jnp.all(jnp.abs(jnp.diag(u) - 1.0) < 0.35)))
      True
    """
    check_count("orthogonalize: steps", steps)

    def axes(tree: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(lambda x: numbers(tuple(range(x.ndim - 1)), x.ndim - 1), tree)

    muon = optax.contrib.scale_by_muon(
        ns_steps=steps, beta=0.0, nesterov=False, weight_dimension_numbers=axes
    )

    def orthogonal(updates: Updates, params: Params = None) -> Any:
        del params

        def widened(u: Array) -> Array:
            u = u.astype(_tree.statistics_dtype(u.dtype))
            return on_every_device(u) if _tree.is_split(u) else u

        wide = jax.tree.map(widened, updates)
        out, _ = muon.update(wide, muon.init(wide))  # beta = 0: it keeps nothing between steps
        return jax.tree.map(lambda x, u: placed_like(x.astype(u.dtype), u), out, updates)

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.ndim(x) >= 2, tree)

    return optax.with_extra_args_support(optax.masked(optax.stateless(orthogonal), matrices))
