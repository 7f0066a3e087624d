"""PyTorch checkpoints of IVON (the package ivon-opt): read into this library, and written back.

    theirs                                            ours
    parameters, in the order of `model.parameters()`  params, the mean m
    group["hess"], flat over the group's parameters   precision per example, p = hess + weight_decay
    group["momentum"], flat, not debiased             the state of `optax.ema`
    group["ess"], "lr", "beta1", "hess_init", ...     arguments of `ivon`, one per group
    nothing                                           the step: it must be given

PyTorch keeps the weight of a linear layer as (out, in) and that of a convolution as (out, in, ...);
Flax keeps kernels as (in, out) and (..., in, out). No tensor library but jax's is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blr_optax import _tree
from blr_optax._validate import check_count
from blr_optax.estimators._curvature import Reparameterized, SquaredGradient
from blr_optax.optimizers.ivon import ivon
from blr_optax.rule import ScaleByPrecisionState
from blr_optax.state._reader import map_posterior_states, posterior_states
from blr_optax.state._reading import covered

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import Hyperparameter, OptState, Params

__all__ = ["TorchIvon", "from_torch_ivon", "to_torch_ivon"]

NAMES = {"lr": "learning_rate", "beta1": "b1", "beta2": "b2"}
ARGUMENTS = ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius")
DEFAULTS = {
    "mc_samples": 1,
    "beta1": 0.9,
    "beta2": 0.99999,
    "hess_init": 1.0,
    "clip_radius": math.inf,
}


class TorchIvon(NamedTuple):
    """What `from_torch_ivon` returns.

    Attributes:
        params: the mean, a tree like the one given.
        opt_state: a state of `tx` with the checkpoint's precision, momentum and step.
        tx: the transformation with which training goes on.
    """

    params: Params
    opt_state: OptState
    tx: optax.GradientTransformationExtraArgs


def _name(path: Any) -> str:
    """Dense_0/kernel, also for a boxed variable."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _to_numpy(x: Any) -> np.ndarray:
    """Convert an array or tensor to numpy's; bfloat16 tensors, unknown to numpy, to float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def _axes(name: str, ndim: int, transpose: Any) -> tuple[int, ...]:
    """Their axes in our order: those given, else a Flax kernel's, else as they are."""
    if transpose is not None and name in transpose:
        return tuple(transpose[name])
    if name.split("/")[-1] == "kernel" and ndim >= 2:
        return (*range(2, ndim), 1, 0)
    return tuple(range(ndim))


def _ours(name: str, x: np.ndarray, like: Any, transpose: Any) -> Array:
    """Their array as our leaf, in float32 or wider."""
    axes = _axes(name, np.ndim(like), transpose)
    theirs = tuple(like.shape[axes.index(axis)] for axis in range(len(axes)))
    if x.size != math.prod(like.shape) or (x.ndim > 1 and x.shape != theirs):
        raise ValueError(
            f"from_torch_ivon: {name} has shape {tuple(like.shape)}, and so needs {theirs} from "
            f"torch, but gets {x.shape}. Check order=, or pass transpose={{{name!r}: axes}}."
        )
    dtype = _tree.statistics_dtype(like.dtype)
    return jnp.asarray(np.transpose(x.reshape(theirs), axes), dtype)


def _theirs(name: str, x: Any, transpose: Any) -> np.ndarray:
    """Our leaf in their order of axes."""
    x = _to_numpy(x)
    return np.transpose(x, np.argsort(_axes(name, x.ndim, transpose)))


def _check_order(who: str, order: Sequence[str], params: Params) -> dict[str, Any]:
    """Return the leaves of params by name."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    known = {_name(path): leaf for path, leaf in paths}
    if sorted(order) != sorted(known):
        raise ValueError(
            f"{who}: order= must name every parameter once, in the optimizer's order. "
            f"Known: {sorted(known)}; missing: {sorted(set(known) - set(order))}; unknown or "
            f"twice: {sorted(x for x in order if x not in known or list(order).count(x) > 1)}."
        )
    return known


def _rebuild(params: Params, leaves: Mapping[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], params)


def _transformation(
    groups: Sequence[Mapping], labels: Any, more: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """`ivon` with the numbers of the checkpoint, one per group."""

    def one(group: Mapping) -> optax.GradientTransformationExtraArgs:
        numbers = {NAMES.get(key, key): group[key] for key in ARGUMENTS}
        radius = numbers["clip_radius"]
        numbers["clip_radius"] = None if radius is None or math.isinf(radius) else radius
        return ivon(**{**numbers, **more})

    if len(groups) == 1:
        return one(groups[0])
    return optax.partition({str(i): one(group) for i, group in enumerate(groups)}, labels)


def from_torch_ivon(
    optimizer_state: Mapping[str, Any],
    weights: Sequence[Any],
    params: Params,
    *,
    order: Sequence[str],
    step: int,
    transpose: Mapping[str, Sequence[int]] | None = None,
    tx: optax.GradientTransformationExtraArgs | None = None,
    **changes: Hyperparameter,
) -> TorchIvon:
    """Return a checkpoint of PyTorch's IVON as params, optimizer state and transformation.

    m = weights, p = hess + weight_decay, momentum = momentum: the training goes on as it would have
    there, up to the noise, and `posterior(opt_state, params)` is its posterior::

        order = ["Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel", "Dense_1/bias"]
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        found = blr.from_torch_ivon(
            optimizer.state_dict(), weights, flax_params, order=order, step=optimizer.current_step
        )

    Args:
        optimizer_state: `optimizer.state_dict()`, of tensors or arrays.
        weights: tensors or arrays in the optimizer's order, group by group, as above (with one
            group that is `list(model.parameters())`); the mean, not a sample.
        params: a tree of parameters or shapes to fill.
        order: for each of the weights, where it belongs in params: names joined by "/".
        step: steps that were made. The checkpoint does not say (`optimizer.current_step` does, when
            the optimizer is at hand), and it has no default: with 0 the first step would be
            1 / (1 - b1) times too long, by debiasing the average a second time. It is also where
            schedules go on. If it is not known, any number well above 1 / (1 - b1) will do.
        transpose: for a name, torch's axes in the order of ours, as in `numpy.transpose`. By
            default a leaf called "kernel" is a Flax kernel, and everything else is left as it is.
        tx: a transformation whose state is to be filled, instead of `ivon` with the numbers of the
            checkpoint (in `optax.partition`, when it has several groups).
        changes: arguments of `ivon` in place of the checkpoint's: a learning-rate schedule, key,
            debias and rescale_lr when they were not the default, ...

    Returns:
        A `TorchIvon` (params, opt_state, tx).

    Raises:
        ValueError: when names, shapes or sizes do not fit, or `tx` has no state of IVON's make.

    Source: the state layout of ivon-opt 0.1.3. For the row of `blr_update` that `ivon` is.

    Example:
      >>> import numpy as np, jax.numpy as jnp, blr_optax as blr
      >>> group = {"lr": 0.1, "ess": 9.0, "hess_init": 1.0, "beta1": 0.9, "beta2": 0.99}
      >>> group |= {"weight_decay": 0.5, "clip_radius": float("inf"), "params": [0]}
      >>> group |= {"momentum": np.zeros(6), "hess": np.arange(6.0)}
      >>> params, state, tx = blr.from_torch_ivon(
      ...     {"state": {}, "param_groups": [group]},
      ...     [np.ones((2, 3))],
      ...     {"kernel": jnp.zeros((3, 2))},
      ...     order=["kernel"],
      ...     step=100,
      ... )
      >>> print(1 / blr.posterior(state, params).variance["kernel"][0])  # 9 (h + 0.5)
      [ 4.5 31.5]
    """
    known = _check_order("from_torch_ivon", order, params)
    if len(weights) != len(order):
        raise ValueError(
            f"from_torch_ivon: {len(weights)} weights, but order= has {len(order)} names."
        )
    check_count("from_torch_ivon: step", step, least=0, arrays=True)
    if "param_groups" not in optimizer_state:
        raise ValueError(
            f"from_torch_ivon: found {[*optimizer_state][:3]}... where an optimizer's "
            "state_dict() has param_groups; the model's own goes into weights=."
        )
    groups, precision, momentum, label = optimizer_state["param_groups"], {}, {}, {}
    needed = (*ARGUMENTS, "params", "hess", "momentum")
    missing = {key for group in groups for key in needed if key not in group}
    if missing:
        raise ValueError(
            f"from_torch_ivon: the parameter groups have no {sorted(missing)}; is this the "
            "state_dict() of IVON's optimizer after a step?"
        )
    ids = [index for group in groups for index in group["params"]]
    if ids != list(range(len(order))):
        raise ValueError(
            f"from_torch_ivon: the groups hold {len(ids)} parameters, order= names {len(order)}; "
            "they must be those of the optimizer, group by group."
        )
    for number, group in enumerate(groups):
        indices: list[int] = group["params"]
        names = [order[index] for index in indices]
        sizes = [math.prod(known[name].shape) for name in names]
        for key, into, shift in (("hess", precision, True), ("momentum", momentum, False)):
            flat = _to_numpy(group[key])
            if flat.shape != (sum(sizes),):
                raise ValueError(
                    f"from_torch_ivon: {key} of group {number} has shape {flat.shape}, but its "
                    f"parameters {names} have {sum(sizes)} entries. Check order=."
                )
            inside = flat + group["weight_decay"] > 0 if shift else True
            if not np.all(np.isfinite(flat) & inside):
                raise ValueError(
                    f"from_torch_ivon: {key} of group {number} is not finite, or hess + "
                    "weight_decay, the precision, not positive."
                )
            for name, part in zip(names, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
                leaf = _ours(name, part, known[name], transpose)
                into[name] = leaf + group["weight_decay"] if shift else leaf
        label |= dict.fromkeys(names, str(number))
    mean = {
        name: _ours(name, _to_numpy(x), known[name], transpose).astype(known[name].dtype)
        for name, x in zip(order, weights, strict=True)
    }
    filled = _rebuild(params, mean)
    if tx is None:
        tx = _transformation(groups, _rebuild(params, label), changes)
    elif changes:
        raise ValueError(f"from_torch_ivon: {sorted(changes)} have no use beside tx=.")
    trees = _rebuild(params, precision), _rebuild(params, momentum)
    opt_state = map_posterior_states(_filler(*trees), _at_step(tx, filled, step))
    return TorchIvon(filled, opt_state, tx)


def _at_step(tx: optax.GradientTransformationExtraArgs, params: Params, step: int) -> Any:
    """Return a state of `tx` at a step: what follows schedules comes from one update before it."""
    state = tx.init(params)
    if step == 0:
        return state
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optax.tree.set(state, count=jnp.asarray(step - 1, jnp.int32))
    state = tx.update(zeros, state, params, statistic=zeros)[1]
    return optax.tree.set(state, count=jnp.asarray(step, jnp.int32))


def _filler(precision: Any, momentum: Any) -> Callable[[Any], Any]:
    """Put the checkpoint's trees into one state of `scale_by_precision`."""

    def fill(state: OptState) -> Any:
        average = _average(state, "from_torch_ivon")
        return state._replace(
            precision=_tree.matching_leaves(precision, state.precision, "params"),
            momentum=average._replace(ema=_tree.matching_leaves(momentum, average.ema, "params")),
        )

    return fill


def _average(state: OptState, who: str) -> optax.EmaState:
    """Return the momentum of a state of `ivon`."""
    if (
        not isinstance(state, ScaleByPrecisionState)
        or not isinstance(state.momentum, optax.EmaState)
        or not isinstance(state.reader.kind, (Reparameterized, SquaredGradient))
        or state.reader.step != "improved"
        or jax.tree.leaves(state.prior)
    ):
        raise ValueError(
            f"{who}: needs the state of ivon without a prior=, which PyTorch's has not; its "
            "precision is hess + weight_decay and its momentum an average."
        )
    return state.momentum


def to_torch_ivon(
    opt_state: OptState,
    params: Params,
    *,
    order: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
    transpose: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return a state of `ivon` as a checkpoint of PyTorch's: (optimizer state_dict, weights).

    hess = p - weight_decay. Arrays are numpy's: put `torch.as_tensor` around the weights and each
    group's "hess" and "momentum" before `optimizer.load_state_dict`, and set
    `optimizer.current_step` to the step, which the format does not hold.

    Args:
        opt_state: any optimizer state with one or more states of `ivon` inside.
        params: the parameters.
        order: names of the parameters in the optimizer's order, group by group, joined by "/".
        groups: torch's parameter groups, each a mapping with "lr" and "weight_decay" (as given to
            `ivon`: the state holds hess + weight_decay) and, where they are not the defaults of
            ivon-opt, "hess_init", "beta1", "beta2", "clip_radius", "mc_samples". With several
            groups, "params" lists the names of each. ess is the state's.
        transpose: as in `from_torch_ivon`.

    Returns:
        `(state_dict, weights)`; mean and momentum exact, hess up to the rounding of one difference.

    Raises:
        ValueError: when names do not fit, a group lacks "lr" or "weight_decay", or has several
            values of ess.

    Source: the state layout of ivon-opt 0.1.3. For the row of `blr_update` that `ivon` is.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> state = blr.ivon(0.1, ess=9.0, weight_decay=0.5, hess_init=2.0).init(params)
      >>> saved, weights = blr.to_torch_ivon(
      ...     state,
      ...     params,
      ...     order=["kernel"],
      ...     groups=[{"lr": 0.1, "weight_decay": 0.5, "hess_init": 2.0}],
      ... )
      >>> print(weights[0].shape, saved["param_groups"][0]["hess"])
      (2, 3) [2. 2. 2. 2. 2. 2.]
    """
    leaves = _check_order("to_torch_ivon", order, params)
    precision, momentum, sizes = {}, {}, {}
    states = posterior_states(opt_state, "to_torch_ivon")
    for state, part in zip(states, covered(states, params, "to_torch_ivon"), strict=True):
        ema = _tree.matching_leaves(_average(state, "to_torch_ivon").ema, part, "params")
        for path, p in jax.tree_util.tree_leaves_with_path(state.precision):
            precision[_name(path)], sizes[_name(path)] = p, float(state.ess)
        momentum |= {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(ema)}
    saved, last = [], 0
    lists = [list(order)] if len(groups) == 1 else [list(group["params"]) for group in groups]
    if [name for names in lists for name in names] != list(order):
        raise ValueError(
            "to_torch_ivon: the groups' params must be order=, cut into pieces; they are "
            f"{lists}, and order= is {list(order)}."
        )
    for names, group in zip(lists, groups, strict=True):
        first, last = last, last + len(names)
        ess = {sizes.get(name) for name in names}
        if len(ess) != 1 or None in ess:
            raise ValueError(
                f"to_torch_ivon: a group needs parameters of one ess; {names} have {ess}."
            )
        missing = sorted({"lr", "weight_decay"} - set(group))
        if missing:
            raise ValueError(
                f"to_torch_ivon: a group lacks {missing}; it has {sorted(group)}, needs lr and "
                f"weight_decay, and may have {sorted(DEFAULTS)}."
            )
        numbers = {**DEFAULTS, **{k: v for k, v in group.items() if k != "params"}}
        decay = numbers["weight_decay"]
        saved.append(
            {
                **numbers,
                "ess": ess.pop(),
                "numel": sum(leaves[name].size for name in names),
                "momentum": _flat(names, momentum, transpose),
                "hess": _flat(names, {n: precision[n] - decay for n in names}, transpose),
                "params": list(range(first, last)),
            }
        )
    state = {"count": 0, "avg_grad": None, "avg_nxg": None, "avg_gsq": None}
    weights = [_theirs(name, leaves[name], transpose) for name in order]
    return {"state": state, "param_groups": saved}, weights


def _flat(names: Sequence[str], leaves: Mapping[str, Any], transpose: Any) -> np.ndarray:
    return np.concatenate([_theirs(name, leaves[name], transpose).ravel() for name in names])
