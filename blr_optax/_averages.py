"""Means over weight samples: one compiled program per function and shape, a chunk at a time.

    n <- n + n',   m <- m + (n'/n) d,   M <- M + M' + (n_old n'/n) d^2,          d = m' - m,

where m is a mean over samples and M the sum of squares about it (Chan, Golub and LeVeque, 1983).
Outside a trace the chunks are a loop of Python over one program: a CPU runs convolutions inside a
compiled loop many times slower than outside. Inside a trace they are unrolled or scanned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _loops, _tree
from blr_optax._validate import check_count, concrete

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import PyTree

PROGRAMS = 32  # kept at most
UNROLLED_CHUNKS = 4


class Average(NamedTuple):
    """Means over samples and, of the first where its spread is wanted, the sum of squares."""

    size: Array
    mean: tuple[Array, ...]
    square: Array


class Task(NamedTuple):
    """What is averaged.

    Attributes:
        statistics: `statistics(functions, weights, inputs)`, a tuple of arrays for one sample.
        finish: `finish(average)`, the result; None for all samples, stacked on a leading axis.
        spread: whether the sum of squares of the first statistic is wanted.
        functions: the user's.
        others: what of the inputs is no array, see `split`.
        samples: how many samples.
        chunk: how many at once.
    """

    statistics: Callable[..., Any]
    finish: Callable[..., Any] | None
    spread: bool
    functions: tuple[Any, ...]
    others: tuple[Any, ...]
    samples: int
    chunk: int

    @property
    def chunks(self) -> int:
        """As many chunks as needed, as equal as possible: 10 samples by 8 are two of 5."""
        return -(-self.samples // self.chunk)

    def indices(self) -> np.ndarray:
        """Return the numbers of the samples by chunk; those beyond the last one do not count."""
        return np.arange(self.chunks * -(-self.samples // self.chunks)).reshape(self.chunks, -1)

    def part(self, index: Array, key: Array, q: Any, arrays: list[Array]) -> Any:
        """Return the average over one chunk, or all its samples."""
        tree, leaves = self.others
        inputs = tree.unflatten(joined(leaves, arrays))

        def one(s: Array) -> tuple:
            weights = draw(q, jax.random.fold_in(key, s), s)
            return self.statistics(self.functions, weights, inputs)

        found = jax.vmap(one)(index)
        if self.finish is None:
            return found
        used = index < self.samples
        count = jnp.sum(used, dtype=jnp.int32)

        def mean(x: Array) -> Array:
            x = x.astype(_tree.statistics_dtype(x.dtype))
            # About the first sample: the mean of equal numbers is that number.
            shifted = jnp.where(used.reshape(-1, *[1] * (x.ndim - 1)), x - x[0], 0)
            return x[0] + jnp.sum(shifted, 0) / count.astype(x.dtype)

        means = tuple(map(mean, found))
        if not self.spread:
            return Average(count, means, jnp.zeros(()))
        deviation = found[0].astype(means[0].dtype) - means[0]
        deviation = jnp.where(used.reshape(-1, *[1] * (deviation.ndim - 1)), deviation, 0)
        return Average(count, means, jnp.sum(deviation**2, 0))


def merged(a: Average, b: Average) -> Average:
    """Return the average over the samples of both."""
    count = a.size + b.size

    def share(x: Array, n: Array) -> Array:
        return n.astype(x.dtype) / count.astype(x.dtype)

    mean = tuple(x + share(x, b.size) * (y - x) for x, y in zip(a.mean, b.mean, strict=True))
    if jnp.shape(a.square) != jnp.shape(mean[0]):  # not wanted
        return Average(count, mean, a.square)
    delta = b.mean[0] - a.mean[0]
    between = a.size.astype(delta.dtype) * share(delta, b.size) * delta**2
    return Average(count, mean, a.square + b.square + between)


def draw(q: Any, key: Array, s: Array) -> PyTree:
    """Return sample s of a posterior, or of the members of an ensemble in turn."""
    return q.sample_member(key, s) if hasattr(q, "sample_member") else q.sample(key, ())


def program(function: Callable[..., Any], *arguments: PyTree) -> Callable[..., Any] | None:
    """Return a function as a compiled program, that of an earlier call if it does the same.

    Two functions do the same when tracing them yields the same steps. Arrays that they read besides
    are arguments of the program, so whatever a function reads, a global name or an attribute, is
    that of now, and running statistics that have changed are not compiled anew. Tracing costs about
    a hundredth of compiling. None for a function that reads a value of a trace that is going on.
    """
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

    # A new function: jax keeps what it has traced under the function.
    traced, shapes = jax.make_jaxpr(lambda *a: function(*a), return_shape=True)(*arguments)
    jaxpr, consts = traced.jaxpr, traced.consts
    if not concrete(consts) or len(jaxpr.invars) > len(jax.tree.leaves(arguments)):
        return None

    def steps(consts: list[Any], leaves: list[Any]) -> list[Any]:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*leaves)

    key = str(jaxpr)
    found = _programs.pop(key, None) or jax.jit(steps)
    _programs[key] = found  # at the end: the first one was used longest ago
    if len(_programs) > PROGRAMS:
        del _programs[next(iter(_programs))]
    outputs = jax.tree.structure(shapes)
    return lambda *arguments: outputs.unflatten(found(consts, jax.tree.leaves(arguments)))


_programs: dict[str, Any] = {}


@functools.lru_cache(maxsize=PROGRAMS)
def finisher(finish: Callable[..., Any] | None, samples: int) -> Callable[..., Any]:
    """Return what makes the result of an average, compiled."""
    return jax.jit(finish or functools.partial(stacked, samples))


add = jax.jit(merged)


def stacked(samples: int, parts: list[PyTree]) -> PyTree:
    """Return all samples of the chunks, on one leading axis."""
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:samples], *parts)


def split(inputs: tuple) -> tuple[tuple, list[Any]]:
    """Return what of the inputs is no array, which stays as it is, and the arrays."""
    leaves, tree = jax.tree.flatten(inputs)
    is_array = [isinstance(x, (jax.Array, np.ndarray, np.generic)) for x in leaves]
    arrays = [x for x, yes in zip(leaves, is_array, strict=True) if yes]
    others = tuple(ARRAY if yes else x for x, yes in zip(leaves, is_array, strict=True))
    return (tree, others), arrays


def joined(others: tuple, arrays: list[Any]) -> list[Any]:
    """Return the leaves of `split` in their order."""
    rest = iter(arrays)
    return [next(rest) if x is ARRAY else x for x in others]


ARRAY = object()  # stands for an array among what is none


NUMBERS = (jax.Array, np.ndarray, np.generic, int, float)


def averaged(task: Task, key: Array, q: Any, arrays: list[Any], programs: dict[Any, Any]) -> Any:
    """Return `task.finish` of the average over all samples, or all of them.

    `programs` keeps the one of these shapes for further batches of one call.
    """
    if not concrete(key, q, arrays):
        return traced(task, key, q, arrays)
    indices = task.indices()
    # A class that is not registered as a tree is a constant.
    tree = all(isinstance(leaf, NUMBERS) for leaf in jax.tree.leaves(q))
    part = task.part if tree else lambda index, key, _, arrays: task.part(index, key, q, arrays)
    arguments = key, q if tree else None, arrays
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in arrays)
    if shapes not in programs:
        programs[shapes] = program(part, indices[0], *arguments)
    if programs[shapes] is None:
        return traced(task, key, q, arrays)
    parts = (programs[shapes](index, *arguments) for index in indices)
    finish = finisher(task.finish, task.samples)
    return finish(functools.reduce(add, parts) if task.finish else list(parts))


def traced(task: Task, key: Array, q: Any, arrays: list[Any]) -> Any:
    """`averaged`, as part of the caller's program."""
    part = functools.partial(task.part, key=key, q=q, arrays=arrays)
    indices = jnp.asarray(task.indices())
    if task.finish is None:
        found = jax.lax.map(part, indices)
        return stacked(task.samples, [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)])
    if task.chunks <= UNROLLED_CHUNKS:
        return task.finish(functools.reduce(merged, map(part, indices)))
    # Zeros like the shapes, as these know how the outputs are sharded.
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, indices[0]))
    total, _ = _loops.scan(lambda a, index: (merged(a, part(index)), None), start, indices)
    return task.finish(total)


def default_chunk(chunk: int | None) -> int:
    """Return a number of samples at once: a CPU gains nothing from more than one."""
    if chunk is None:
        return 1 if jax.default_backend() == "cpu" else 8
    check_count("chunk", chunk)
    return chunk


# --- long inputs ----------------------------------------------------------------------------------


def in_batches(
    run: Callable[..., PyTree], inputs: tuple, batch_size: int, progress: bool, axis: int = 0
) -> PyTree:
    """Run over batches of the inputs' leading axis and join the results, in the memory of one.

    The examples are on the given axis of the results.

    The last batch is filled up with its last example, so that all have one shape.
    """
    check_count("batch_size", batch_size)
    if not concrete(inputs):
        raise ValueError(
            f"batch_size={batch_size} and progress= are for calls outside jit, where each batch is "
            "one call of a compiled program; inside, map over batches yourself."
        )
    sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(inputs) if jnp.ndim(x)}
    if len(sizes) != 1:
        raise ValueError(
            f"batch_size={batch_size} needs one leading axis of examples shared by all inputs; "
            f"found sizes {sorted(sizes)}. What is not per example belongs into apply."
        )
    (size,) = sizes
    if not size:
        raise ValueError(f"batch_size={batch_size}: the inputs hold no examples.")

    def rows(x: Any, start: int) -> Any:
        index = np.minimum(np.arange(start, start + batch_size), size - 1)
        return x[index] if jnp.ndim(x) else x

    found = []
    for start in shown(range(0, size, batch_size), progress):
        result = run(*jax.tree.map(functools.partial(rows, start=start), inputs))
        for x in jax.tree.leaves(result):
            if jnp.shape(x)[axis : axis + 1] != (batch_size,):
                raise ValueError(
                    f"batch_size={batch_size} needs outputs with a leading axis of examples; apply "
                    f"gave a result of shape {jnp.shape(x)[axis:]} for a batch of that size."
                )
        found.append(jax.device_get(result))

    def whole(*parts: np.ndarray) -> Array:
        return jnp.asarray(np.concatenate(parts, axis)[(slice(None),) * axis + (slice(size),)])

    return jax.tree.map(whole, *found)


def shown(steps: Iterable[int], progress: bool) -> Iterator[int]:
    """Go through the steps, with a progress bar on demand."""
    if not progress:
        yield from steps
        return
    try:
        from rich.progress import track
    except ImportError:
        raise ImportError(
            "progress=True draws its bar with rich: pip install 'blr_optax[demo]'."
        ) from None
    yield from track(steps, description="predict")
