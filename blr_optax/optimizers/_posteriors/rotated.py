"""Independent normals in a basis of their own for every matrix of a tree of weights.

    X        a leaf as a matrix [m, n]: its last axis are the columns, all others the rows
    L, R     orthonormal bases of its rows and columns (identity where absent)
    X'       L^T X R, the coordinates                  X = L X' R^T
    s        precision of every coordinate, [m, n]

    q(X) = N( X' | M', diag(1 / s) )         cov(vec X) = (R (x) L) diag(1 / s) (R (x) L)^T

With A and B symmetric, L and R their eigenvectors and s the products of their eigenvalues, this is
the matrix Gaussian of precision B (x) A; with s free, it is more (Minut et al. 2026).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from blr_optax import _tree
from blr_optax._validate import concrete
from blr_optax.families import MeanField, Normal
from blr_optax.families._base.family import Family
from blr_optax.families._base.parameters import parameters
from blr_optax.families._numerics.special import LOG_2PI

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import NaturalParameters, PyTree


class Basis(NamedTuple):
    """Bases of a matrix's rows and columns, vectors in columns; None is the identity."""

    left: Array | None
    right: Array | None


def _own_mesh(x: Array) -> Any:
    """Return the explicit mesh that the type of x names, also where none is set; else None."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or set(mesh.axis_types) != {AxisType.Explicit} else mesh


def beside(x: Array, like: Array) -> Array:
    """x whole on every device of the explicit mesh of `like`, if it has one."""
    mesh = _own_mesh(like)
    if mesh is None:
        return x
    if not concrete(like):
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    placed: Any = like.sharding  # its type names no devices, this does
    return jax.device_put(x, NamedSharding(placed.mesh, PartitionSpec()))


def on_every_device(x: Array) -> Array:
    """x whole on every device of its own mesh, else of the one that is set; x itself without."""
    if _own_mesh(x) is not None:
        return beside(x, x)
    kinds = set(jax.sharding.get_abstract_mesh().axis_types)
    if kinds == {AxisType.Explicit}:
        return jax.sharding.reshard(x, PartitionSpec())
    if kinds == {AxisType.Auto}:
        return jax.lax.with_sharding_constraint(x, PartitionSpec())
    return x


def placed_like(x: Array, like: Array) -> Array:
    """x split over devices as `like` is, where types say so."""
    return jax.sharding.reshard(x, jax.typeof(like).sharding) if _tree.is_split(like) else x


def _both_sides(x: Array, left: Array | None, right: Array | None) -> Array:
    """left X right; leading sample axes stay."""
    if _tree.is_split(x):
        return placed_like(_both_sides(on_every_device(x), left, right), x)
    shape = x.shape
    if left is not None:
        rows, columns = left.shape[-1], shape[-1]
        x = left @ (x if x.ndim == 2 else x.reshape(-1, rows, columns))
    return (x if right is None else x @ right).reshape(shape)


def _transposed(x: Array | None) -> Array | None:
    return None if x is None else x.T


def to_basis(x: Array, basis: Basis) -> Array:
    """L^T X R."""
    return _both_sides(x, _transposed(basis.left), basis.right)


def from_basis(x: Array, basis: Basis) -> Array:
    """L X R^T."""
    return _both_sides(x, basis.left, _transposed(basis.right))


def over(turn: Callable[[Array, Basis], Array], tree: PyTree, bases: dict[str, Basis]) -> PyTree:
    """Return a tree with `turn` applied to the leaves that have a basis."""

    def leaf(path: Any, x: Array) -> Array:
        basis = bases.get(_tree.leaf_name(path))
        return x if basis is None else turn(x, basis)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def squared(bases: dict[str, Basis]) -> dict[str, Basis]:
    """Squares of all entries: what carries variances, where the basis carries means."""
    return jax.tree.map(jnp.square, bases)


def overlap(a: dict[str, Basis], b: dict[str, Basis]) -> dict[str, Basis]:
    """a^T b: `to_basis` of it turns coordinates in a into coordinates in b."""
    return jax.tree.map(lambda x, y: x.T @ y, a, b)


def by_eigenvectors(factor: Array, basis: Array) -> Array:
    """Eigenvectors, the largest first: the order that power iterations keep.

    Signs, and vectors that the factor sends to zero, would be a matter of rounding. So every vector
    points along one fixed direction, and the latter diagonalise a fixed matrix.
    """
    del basis
    values, vectors = (x[..., ::-1] for x in jnp.linalg.eigh(factor))
    size = factor.shape[0]
    kept = values > _rounding(values[:1], size)
    rest = jnp.eye(size, dtype=factor.dtype) - (vectors * kept) @ vectors.T
    ramp = jnp.linspace(1.0, 2.0, size, dtype=factor.dtype)
    others = jnp.linalg.eigh((rest * ramp) @ rest)[1][:, ::-1]
    q = jnp.where(kept, vectors, jnp.roll(others, jnp.sum(kept), axis=1))
    along = jnp.cos(jnp.arange(size, dtype=factor.dtype)) @ q
    return q * jnp.where(along < 0, -1.0, 1.0).astype(q.dtype)


def _rounding(largest: Array, size: int) -> Array:
    """Return what an eigenvalue of zero may come out as, beside the largest one."""
    return 8.0 * size * jnp.finfo(largest.dtype).eps * largest


def by_power(factor: Array, basis: Array) -> Array:
    """One orthogonal iteration, with the signs of the old vectors.

    A rounding's worth of the identity keeps the vectors that the factor sends to zero; of what
    rounding made of those nothing else is left.
    """
    rounding = jnp.finfo(factor.dtype).eps * jnp.trace(factor)
    moved = factor @ basis
    sizes = jnp.linalg.norm(moved, axis=0)
    moved = jnp.where(sizes > _rounding(jnp.max(sizes), len(sizes)), moved, 0.0)
    q, r = jnp.linalg.qr(moved + rounding * basis)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype)


@parameters
class RotatedNatural(NamedTuple):
    """Parameters: M in the weights' own coordinates, s in the basis, and the bases by path."""

    mean: PyTree
    precision: PyTree
    bases: dict[str, Basis]


@dataclasses.dataclass(frozen=True)
class Rotated(Family):
    """Independent normals along the axes of a basis, leaf by leaf; an event is a whole tree.

    log q(theta) = sum over leaves of sum (log s - s (X' - M')^2 - log 2 pi) / 2.

    Standard parameters: `mean` and `precision`, trees like the weights, and `bases`, a dict from
    the paths of leaves to a `Basis`; leaves without one are independent normals themselves. They
    are also the state. Two members of one basis have a product, of different bases they have not.

    Example:
      >>> import jax.numpy as jnp
      >>> from blr_optax.optimizers._posteriors.rotated import Basis, Rotated
      >>> turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
      >>> lam = Rotated().natural(
      ...     mean=jnp.zeros((2, 1)),
      ...     precision=jnp.array([[1.0], [4.0]]),
      ...     bases={"": Basis(turn, None)},
      ... )
      >>> print(Rotated().variance(lam)[:, 0].round(4))  # 0.36 + 0.64 / 4, 0.64 + 0.36 / 4
      [0.52 0.73]
    """

    Natural: ClassVar[type] = RotatedNatural

    def natural(
        self, *, mean: PyTree, precision: PyTree, bases: dict[str, Basis]
    ) -> RotatedNatural:
        """Return the parameters; `precision` is in the basis."""
        return RotatedNatural(mean, precision, bases)

    def standard(self, lam: RotatedNatural) -> dict[str, PyTree]:
        return dict(lam._asdict())

    def mean(self, lam: RotatedNatural) -> PyTree:
        return lam.mean

    def variance(self, lam: RotatedNatural) -> PyTree:
        variances = jax.tree.map(lambda s: 1.0 / s, lam.precision)
        return over(from_basis, variances, squared(lam.bases))

    def in_domain(self, lam: RotatedNatural) -> Array:
        checks = [jnp.all((s > 0) & jnp.isfinite(s)) for s in jax.tree.leaves(lam.precision)]
        checks += [jnp.all(jnp.isfinite(m)) for m in jax.tree.leaves(lam.mean)]
        return jnp.all(jnp.array(checks))

    def join(
        self, lam: RotatedNatural, other: Family, other_lam: NaturalParameters
    ) -> tuple | None:
        """With rotated normals, or plain ones, which have no bases: over the leaves of both."""
        if other == MeanField(Normal()):
            mean, precision = other.mean(other_lam), other.precision(other_lam)
            other, other_lam = self, self.natural(mean=mean, precision=precision, bases={})
        if other != self:
            return None
        return self, RotatedNatural(
            mean=_tree.fill(lam.mean, other_lam.mean),
            precision=_tree.fill(lam.precision, other_lam.precision),
            bases=lam.bases | other_lam.bases,
        )

    def sample(self, key: Array, lam: RotatedNatural, shape: tuple[int, ...] = ()) -> PyTree:
        """Draws of every leaf, each with its own key by path."""

        def leaf(path: Any, s: Array) -> Array:
            k = jax.random.fold_in(key, _tree.path_hash(path))
            return jax.random.normal(k, shape + s.shape, s.dtype) * jax.lax.rsqrt(s)

        drawn = jax.tree_util.tree_map_with_path(leaf, lam.precision)
        return jax.tree.map(jnp.add, lam.mean, over(from_basis, drawn, lam.bases))

    def _total(self, f: Callable[..., Array], lam: RotatedNatural, *trees: Any) -> Array:
        """Half the sum of f(s, *leaves) over leaves and over each leaf's own axes."""
        rows = jax.tree.map(
            lambda s, *xs: jnp.sum(f(s, *xs), axis=tuple(range(-s.ndim, 0))), lam.precision, *trees
        )
        return 0.5 * sum(jax.tree.leaves(rows), start=jnp.zeros(()))

    def log_prob(self, lam: RotatedNatural, theta: PyTree) -> Array:
        away = over(to_basis, jax.tree.map(jnp.subtract, theta, lam.mean), lam.bases)
        return self._total(lambda s, d: jnp.log(s) - s * d * d - LOG_2PI, lam, away)

    def entropy(self, lam: RotatedNatural) -> Array:
        return self._total(lambda s: 1.0 + LOG_2PI - jnp.log(s), lam)

    def kl(self, lam_p: RotatedNatural, lam_q: RotatedNatural) -> Array:
        """In closed form, whatever the two bases (which must be of the same leaves and sides)."""
        carried = squared(overlap(lam_p.bases, lam_q.bases))
        variances = over(to_basis, jax.tree.map(lambda s: 1.0 / s, lam_p.precision), carried)
        away = over(to_basis, jax.tree.map(jnp.subtract, lam_p.mean, lam_q.mean), lam_q.bases)
        spread = self._total(lambda s, v, d: s * (v + d * d) - 1.0, lam_q, variances, away)
        return spread + self._total(lambda s, t: jnp.log(s / t), lam_p, lam_q.precision)
