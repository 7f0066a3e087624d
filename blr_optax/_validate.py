"""Checks of arguments, where Python may look at their values, and hyper-parameters as numbers."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import Hyperparameter, Params, PyTree, ScalarOrSchedule, Updates


def concrete(*values: PyTree) -> bool:
    """Whether all arrays in these trees have values that Python may look at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def holds(test: Callable[[PyTree], PyTree], value: Any) -> bool:
    """Whether a test holds for all of a value; True for traced ones, which Python cannot see.

    Constants are evaluated outside any trace that the caller may be in, such as a scan's. Of plain
    numbers nothing is compiled, if the test is an operator of Python.
    """
    if not concrete(value):
        return True
    with jax.ensure_compile_time_eval():
        found = test(value)
        return bool(jnp.all(found) if isinstance(found, jax.Array) else np.all(found))


def require(name: str, value: Any, valid: str, test: Callable[[PyTree], PyTree]) -> None:
    """Raise ValueError when a concrete standard parameter is outside its range."""
    if not holds(lambda x: test(jnp.asarray(x)), value):
        raise ValueError(f"{name} must be {valid}; got {value}.")


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a number or an array of numbers."""
    return isinstance(leaf, (int, float)) or hasattr(leaf, "dtype")


def is_schedule(hyper: Any) -> bool:
    """Whether a hyper-parameter is a function of the step.

    A tree of numbers may be callable as well: Equinox's modules are.
    """
    if not callable(hyper) or isinstance(hyper, jax.tree_util.Partial):
        return callable(hyper)
    leaves = jax.tree.leaves(hyper)
    return not leaves or not all(map(is_number, leaves))


def at(hyper: Hyperparameter, count: Any) -> PyTree:
    """Return the value of a number, array, tree or schedule at a step."""
    return hyper(count) if is_schedule(hyper) else hyper


def size_at(ess: ScalarOrSchedule, count: Any) -> Any:
    """Return the effective sample size at a step; a whole number may be larger than an int32."""
    size = at(ess, count)
    return size if isinstance(size, jax.Array) else float(size)


def _first_value(name: str, schedule: Any, scalar: bool) -> Any:
    """Return what a schedule gives for step 0.

    Raises:
        ValueError: when that is no number (without `scalar`: no tree of numbers).
    """
    other = (
        f"{name}: a function must be a schedule, which takes the step and returns "
        f"{'one number' if scalar else 'a number or a tree of numbers'}; "
    )
    hint = "" if scalar else " A function of params, as optax takes it for a mask, goes into mask=."
    try:
        with jax.ensure_compile_time_eval():
            value = schedule(jnp.zeros((), jnp.int32))
    except Exception as error:
        raise ValueError(f"{other}for step 0 this one fails: {error}.{hint}") from error
    leaves = jax.tree.leaves(value)
    one = jax.tree_util.all_leaves([value]) and leaves and not jnp.ndim(leaves[0])
    numbers = all(
        is_number(x) and not jnp.issubdtype(jnp.result_type(x), jnp.bool_) for x in leaves
    )
    if not leaves or not numbers or (scalar and not one):
        raise ValueError(f"{other}for step 0 this one returned {value!r}.{hint}")
    return value


def refuse_mask(name: str, hyper: Any, params: Params) -> None:
    """Raise ValueError for a function of params, which a schedule is taken for.

    Of the tree of params it makes a tree like it; a schedule does not.
    """
    if not is_schedule(hyper) or jax.tree_util.all_leaves([params]):
        return
    count = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        made = jax.eval_shape(lambda tree: hyper(tree), params)
        of_count = jax.tree.structure(jax.eval_shape(lambda step: hyper(step), count))
    except Exception:  # of whatever a schedule raises that is given a tree
        return
    structure = jax.tree.structure(params)
    if structure.num_leaves and jax.tree.structure(made) == structure != of_count:
        raise ValueError(
            f"{name} is a function that makes a tree like params of params. A function there is a "
            "schedule, of the step: give the tree itself, or the number and mask=, a tree of "
            "booleans or a function from params to one."
        )


def is_finite(number: Any) -> Any:
    """Whether a number or an array is finite; a whole number of Python may be of any size."""
    return math.isfinite(number) if isinstance(number, (int, float)) else jnp.isfinite(number)


def refuse_short(name: str, number: Any) -> None:
    """Raise ValueError for one number in a type below float32, such as `inject_hyperparams` makes.

    In bfloat16 a decay of 0.999 is 1, and nothing that is decayed with it ever learns.
    """
    dtype = getattr(number, "dtype", None)
    if dtype is None or jnp.ndim(number) or not jnp.issubdtype(dtype, jnp.floating):
        return
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} is a {dtype} number, too coarse for what it does (a decay of 0.999 is 1 "
            "there). optax.inject_hyperparams casts to the weights' type: give it "
            "hyperparam_dtype=jnp.float32."
        )


def check_positive(
    name: str,
    hyper: Hyperparameter,
    *,
    zero: bool = False,
    scalar: bool = False,
    schedule: bool = True,
) -> None:
    """Raise ValueError for concrete numbers out of range; traced ones pass.

    With `scalar` also for whatever is not one number for all weights; of a schedule (refused
    without `schedule`) the value at step 0 is checked.
    """
    if hyper is None:
        raise ValueError(f"{name}=None must be a number, an array or a schedule.")
    refuse_short(name, hyper)
    if is_schedule(hyper):
        if not schedule:
            raise ValueError(f"{name} must be a number or a tree of numbers, not a function.")
        hyper = _first_value(name, hyper, scalar)
        name += " at step 0"
    if scalar and not isinstance(hyper, (str, bool)):
        one = isinstance(hyper, (int, float)) or hasattr(hyper, "dtype")
        if not one or jnp.ndim(hyper):
            found = f"shape {jnp.shape(hyper)}" if one else repr(hyper)
            raise ValueError(
                f"{name} must be one number or a schedule, for all weights; got {found}. Other "
                "numbers for other leaves: one optimizer each, in optax.partition."
            )
    for number in jax.tree.leaves(hyper):
        if isinstance(number, (str, bool)) or not is_number(number):
            raise ValueError(f"{name}={number!r} must be a number, an array or a schedule.")
        if not holds(lambda x: (x >= 0) if zero else (x > 0), number):
            raise ValueError(f"{name}={number} must be {'at least zero' if zero else 'positive'}.")
        if not holds(is_finite, number):
            raise ValueError(f"{name}={number} must be finite.")


def check_number(name: str, number: Any, *, zero: bool = False) -> None:
    """Raise ValueError for what is not one number in range, a schedule included."""
    if is_schedule(number):
        raise ValueError(f"{name} must be one number, not a schedule.")
    check_positive(name, number, zero=zero, scalar=True)


def is_zero(hyper: Hyperparameter) -> bool:
    """Whether a hyper-parameter is the plain number zero."""
    return isinstance(hyper, (int, float)) and hyper == 0


def check_unit_interval(name: str, number: Any) -> None:
    """Raise ValueError for a concrete number outside [0, 1), or what is not a number."""
    if not is_number(number):
        raise ValueError(f"{name}={number!r} must be one number, in [0, 1).")
    refuse_short(name, number)
    if not holds(lambda x: (x >= 0) & (x < 1), number):
        raise ValueError(f"{name}={number} must be in [0, 1).")


def check_whole(name: str, number: Any, arrays: bool = False) -> int:
    """Return a whole number of Python; with `arrays` also from an array of one.

    Raises:
        ValueError: for what is none, or not known to Python.
    """
    try:
        if isinstance(number, bool) or (isinstance(number, jax.Array) and not arrays):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise ValueError(
            f"{name}={number!r} must be a plain whole number; with inject_hyperparams name it in "
            f'static_args=("{name.split()[-1]}",).'
        ) from None


def check_count(name: str, number: Any, least: int = 1, arrays: bool = False) -> None:
    """Raise ValueError for what is not a whole number, or too small a one."""
    number = check_whole(name, number, arrays)
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}.")


def all_finite(*trees: PyTree) -> PyTree:
    """One boolean: whether every entry is finite.

    Sizes are compared over the leading axes first, whole rows at a time.
    """
    return jnp.isfinite(_once(_tree_max(map(_size, jax.tree.leaves(trees)))))


def within_reach(grads: Updates, growth: Any, squares: bool) -> Array:
    """One boolean: whether all entries are finite, `growth` times as large, or squared.

    Both in the gradient's own type, in which optax forms them. The cost is `all_finite`'s.
    """

    def grown(x: Array) -> Array:
        size = _size(x)
        return jnp.square(1.01 * size) if squares else (growth * size).astype(size.dtype)

    return jnp.isfinite(_once(_tree_max(map(grown, jax.tree.leaves(grads)))))


def _once(size: Array) -> Array:
    """Return the root of a number made of all leaves.

    XLA computes a root once, and stores it. A chain of sums or comparisons alone, a link for each
    leaf, it would compile into every kernel that reads the end of the chain.
    """
    return jnp.sqrt(jax.lax.stop_gradient(size))


def _tree_max(numbers: Iterable[Array]) -> Array:
    return functools.reduce(jnp.maximum, numbers, jnp.zeros((), jnp.float32))


def _size(x: Array) -> Array:
    """max |x|, over the leading axes first."""
    return jnp.max(_largest(x), initial=0.0)


def _largest(x: Array) -> Array:
    """|x|, maximised over the leading axes."""
    return jnp.max(jnp.abs(x), axis=tuple(range(jnp.ndim(x) - 1)), initial=0.0)


def squares_finite(grads: Updates, curvature: PyTree = None) -> Array:
    """One boolean: whether all entries, and what follows from squares of gradients, are finite.

    A gradient that is finite but so large that its square is not within reach of the curvatures'
    arithmetic counts as non-finite.
    """
    return finite_and_square(grads, curvature)[0]


def finite_and_square(grads: Updates, curvature: PyTree = None) -> tuple[Array, Array]:
    """(`squares_finite`, sum of all squares of the gradients).

    One sum tells both: a second pass would read the trees again, and be compiled for every leaf.
    """
    leaves = jax.tree.leaves(grads)
    beside = [None] * len(leaves) if curvature is None else jax.tree.leaves(curvature)
    reach = [float(jnp.finfo(g.dtype).max) ** 0.7 for g in leaves]

    def within(g: Array, c: Array, limit: float) -> Array:
        inside, axes = jnp.abs(c) < limit, tuple(range(c.ndim - g.ndim))
        return jnp.all(inside, axis=axes) if axes else inside  # each square counts once

    def summed(g: Array, c: Array | None, limit: float) -> Array:
        square = jnp.square(g) if c is None else jnp.where(within(g, c, limit), g * g, jnp.nan)
        # It never binds: a maximum keeps XLA from joining the two sums into one, which no processor
        # makes of many numbers at a time.
        return jnp.sum(jnp.maximum(jnp.sum(square, axis=tuple(range(g.ndim - 1))), 0.0))

    total = functools.reduce(
        jnp.add, map(summed, leaves, beside, reach), jnp.zeros((), jnp.float32)
    )
    return _once(total) < min(reach, default=1.0) ** 0.5, total


def zero_unless(finite: Any, tree: PyTree) -> PyTree:
    """Return the tree where all is finite, else zeros."""
    return optax.tree.where(finite, tree, optax.tree.zeros_like(tree))


def near(a: Array, b: Array) -> Array:
    """Whether a mean and a parameter agree up to the parameter's rounding."""
    rounding = 10 * jnp.finfo(b.dtype).eps
    return jnp.all(jnp.abs(a - b.astype(a.dtype)) <= rounding * (1.0 + jnp.abs(a)))


def positive(tree: PyTree) -> list[Any]:
    """Whether all entries are positive, for every leaf of a tree."""
    return [
        jnp.all(x > 0) if isinstance(x, jax.Array) else np.all(x > 0) for x in jax.tree.leaves(tree)
    ]


# Names under which the second statistic of `update` is given by mistake; others may be meant for
# another member of a chain.
MISTAKEN = ("curvature", "hessian", "hess", "statistics")


def check_state(state: Any, field: str) -> None:
    """Raise ValueError for a state of `update` that is none: it has not the field of one."""
    if not hasattr(state, field):
        raise ValueError(
            "update: its second argument must be the optimizer state, as tx.init(params) makes and "
            f"update returns it; got {type(state).__name__}. The order is update(grads, opt_state, "
            "params)."
        )


def check_update_arguments(state: Any, extra: dict[str, Any]) -> None:
    """Raise ValueError for an `update` whose state is none, or whose statistic has another name."""
    check_state(state, "reader")
    for name in MISTAKEN:
        if name in extra:
            raise ValueError(
                f"update: {name}= is no argument, and would be ignored; the second statistic is "
                "statistic=, as in update(est.grad, opt_state, params, statistic=est.statistic)."
            )


def _described(found: PyTree) -> str:
    """Say in words what a function returned."""
    if found is None:
        return "None (is a `return` missing?)"
    if isinstance(found, (tuple, list)):
        return f"a {type(found).__name__} of {len(found)}"
    if jax.tree_util.all_leaves([found]) and hasattr(found, "dtype"):
        return f"an array of shape {jnp.shape(found)} and dtype {jnp.result_type(found)}"
    return f"a {type(found).__name__}"


def _check_arguments(who: str, loss: Callable[..., Any], args: tuple, options: dict) -> None:
    """Raise ValueError when a function does not take these arguments."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # of some callables there is none
        return
    try:
        signature.bind(*args, **options)
    except TypeError:
        given = "".join(f", {name}=" for name in options)
        raise ValueError(
            f"{who}: the loss takes {signature}, and got the parameters and {len(args) - 1} of the "
            f"batch{given}. Pass its arrays one by one, (loss, opt_state, params, x, y); to an "
            "optimizer that evaluates the loss itself, update(None, opt_state, params, "
            "batch=(x, y))."
        ) from None


def scalar_loss(
    who: str, loss: Callable[..., Any], has_aux: bool = False, real: bool = True
) -> Callable[..., Any]:
    """Return the loss, which now says in words when it does not return one number.

    With `has_aux` it has to return `(number, aux)`; with `real` a floating-point one, as a
    derivative needs. Only shapes are looked at, while tracing.
    """
    if not callable(loss):
        raise ValueError(
            f"{who}: the loss must be a function loss(params, *batch); got {type(loss).__name__}."
        )

    @functools.wraps(loss, updated=())
    def checked(*args: Any, **options: Any) -> Any:
        _check_arguments(who, loss, args, options)
        found = loss(*args, **options)
        value = found
        if has_aux:
            if not isinstance(found, (tuple, list)) or len(found) != 2:
                raise ValueError(
                    f"{who}: with has_aux=True the loss must return (value, aux); it returned "
                    f"{_described(found)}."
                )
            value = found[0]
        elif isinstance(found, (tuple, list)):
            raise ValueError(
                f"{who}: the loss must return one number; it returned {_described(found)}. "
                "If it returns (value, aux), pass has_aux=True where that is an argument, else "
                "let it return the value alone."
            )
        number = isinstance(value, (int, float)) or hasattr(value, "dtype")
        if not number or jnp.shape(value) != ():
            raise ValueError(
                f"{who}: the loss must return one number, the mean over the examples; it returned "
                f"{_described(value)}. Take jnp.mean(...) of it."
            )
        if real and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"{who}: the loss must return one real floating-point number; it returned "
                f"{_described(value)}."
            )
        return found

    return checked


def unwritten(owner: Any, signature: str, page: str = "families") -> NotImplementedError:
    """Return the error of a method that a class must write and has not.

    Args:
        owner: the instance that was asked.
        signature: of the method, such as "mean(self, lam)".
        page: the page of the documentation that has an example.
    """
    name = signature.partition("(")[0]
    about = (getattr(type(owner), name).__doc__ or "").strip().split("\n")[0]
    return NotImplementedError(
        f"{type(owner).__name__} has no {name} of its own, which is needed here: define "
        f"`def {signature}` in it. {about} An example is in docs/{page}.md."
    )
