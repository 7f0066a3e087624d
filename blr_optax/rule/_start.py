"""Where `blr_update` starts: the family over a tree of parameters, and its first lambda."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._distribution import Distribution, check_distribution
from blr_optax.families import (
    Centered,
    Family,
    Leafwise,
    MeanField,
    Product,
    Raveled,
    SideBySide,
    get,
)

if TYPE_CHECKING:
    from blr_optax._typing import NaturalParameters, Params, PyTree


def family_over(family: str | Family, params: Params) -> Family:
    """Return a family over a tree: elementwise ones become mean fields, Gaussians ravel.

    Matrix families are one per leaf.

    Other families take what they sample: a vector, a matrix, a NamedTuple, or batches of these.
    """
    family = get(family)
    if isinstance(family, (MeanField, Raveled, Leafwise, Product, SideBySide)):
        return family
    if family.conditional:
        leaves = jax.tree.leaves(params)
        one = jax.tree_util.all_leaves([params]) or not leaves
        if family.event_ndim == 2 and leaves:
            is_matrix = one and jnp.ndim(params) == 2
            return family if is_matrix else Leafwise.like(family, params)
        if family.event_ndim == 1 and leaves:
            one = one and jnp.ndim(params) == 1
        return family if one else Raveled.like(family, params)
    if family.elementwise:
        return MeanField(family)
    is_vector = isinstance(params, jax.Array) and params.ndim == 1
    return Raveled.like(family, params) if family.location and not is_vector else family


def check_whole_tree(family: Family, params: Params) -> None:
    """Raise ValueError for parameters that a family over all of them cannot be made for.

    They are the placeholder of `map_params`, and leaves that an explicit mesh splits.
    """
    leaves = jax.tree.leaves(params)
    if not leaves and not isinstance(family, (MeanField, Product, SideBySide)):
        raise ValueError(
            f"blr_update: params has no leaves, so there is nothing for {type(family).__name__} to "
            "be over. A group of optax.partition that matches none takes no such row. If this is "
            "optax.tree.map_params: the state holds the raveled parameters or a matrix over them, "
            "and no tree like params; use jax.tree.map on the state."
        )
    if any(map(_tree.is_split, leaves)):
        raise ValueError(
            "blr_update: a parameter is split over an axis of a mesh whose type is Explicit; rows "
            "that evaluate the loss themselves take whole parameters, or a mesh of Auto axes: "
            "jax.make_mesh(..., axis_types=(AxisType.Auto,))."
        )


def first_natural(
    family: Any, params: Params, init: Distribution | None, prior: Distribution | None
) -> PyTree:
    """Return the first lambda: `init`, else centred at params, else the prior."""
    # Copies: a state that held the parameters themselves would be donated with them.
    params = jax.tree.map(lambda p: jnp.array(p, _tree.statistics_dtype(p.dtype)), params)
    if init is not None:
        return jax.tree.map(jnp.array, init.natural)
    if family.location:
        return family.natural_at(params, None if prior is None else prior.natural)
    if prior is not None:
        return jax.tree.map(jnp.array, prior.natural)
    lifted = isinstance(family, MeanField)
    name = type(family.family if lifted else family).__name__
    tree = f"; over a tree it is Distribution(MeanField({name}()), ...)" if lifted else ""
    ways = "init= or prior=" if family.exponential else "init="
    raise ValueError(
        f"blr_update: {name} has no location to centre at params; pass {ways}, a Distribution of "
        f"the family{tree}."
    )


def check_like(name: str, given: Distribution | None, family: Any, params: Params) -> None:
    """Raise ValueError when a posterior argument does not fit the family and the parameters."""
    if given is None or not jax.tree.leaves(params):  # optax's placeholder has no leaves
        return
    check_distribution(name, given)
    if not isinstance(given.natural, family.Natural):
        raise ValueError(
            f"{name}: natural parameters of type {type(given.natural).__name__}; the family over "
            f"params has {family.Natural.__name__}."
        )
    own, ours = _counted_from(given.family), _counted_from(family)
    if own != ours:
        raise ValueError(
            f"{name}: its statistics are counted from {own}, the rule's from {ours}: give both the "
            "same families.Centered(family, at=...)."
        )
    if not family.location:
        return  # nothing to compare with: `check_params` compares the mean
    like = jax.eval_shape(lambda p: first_natural(family, p, None, None), params)
    check_shapes(name, given, like)


def _counted_from(family: Family) -> Any:
    """Return the point from which a family's statistics are counted, see `Centered`."""
    lifted = family.family if isinstance(family, (MeanField, Raveled)) else family
    return lifted.at if isinstance(lifted, Centered) else "the origin"


def check_shapes(name: str, given: Distribution, like: PyTree) -> None:
    """Raise ValueError when a posterior argument is not shaped like lambda."""
    found, wanted = (jax.tree.map(jnp.shape, x) for x in (given.natural, like))
    if found != wanted:
        raise ValueError(
            f"{name}: its natural parameters have structure and shapes {found}; the family over "
            f"params has {wanted}."
        )


def check_params(family: Any, natural: NaturalParameters, params: Params) -> None:
    """Raise ValueError when the parameters are not shaped like q's mean."""
    if not jax.tree.leaves(params):
        return
    mean = jax.eval_shape(family.mean, natural)
    shapes = [jax.tree.map(jnp.shape, x) for x in (mean, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "blr_update: params must be like the mean of q, with structure and shapes "
            f"{shapes[0]}; got {shapes[1]}. Start from params = q.mean, q being init= or prior=; "
            "over a tree q is a Distribution of MeanField(family)."
        )
