"""Which way every parameter goes, found from the shapes of the loss alone.

The loss of one example is followed equation by equation, each operand being a constant, something
that depends on the example, or a view of parameters. A parameter goes by its places when every use
of it is one and no two of them touch the same number: sum_i (G_i + G'_i)^2 is not the sum of its
places' squares. Otherwise small parameters are copied for every example, as a whole, so that all
uses come together; large ones get plain per-example gradients, a few examples at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from blr_optax.per_example._taps import _jaxpr
from blr_optax.per_example._taps._equations import BATCHED, CASTS, CONST, SMALL, VIEW, rule

PLACES, COPY, CHUNKS, UNUSED = "places", "copy", "chunks", "unused"


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A part of some parameters, in some shape.

    Attributes:
        roots: the parameters, by position.
        level: the body of which loop it lives in; numbers are only compared within one.
        numbers: which numbers of the level it holds, found when asked for.
        scaled: whether it is a multiple of its numbers.
        joined: whether it was put together from several views, which may hold the same number.
    """

    roots: frozenset[int]
    level: int
    numbers: Callable[[], np.ndarray]
    scaled: bool = False
    joined: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A view that met something: by which rule, at which equation, as which operand."""

    view: View
    by: str
    eqn: Any
    operand: int

    @property
    def size(self) -> int:
        """How many numbers the view holds."""
        return math.prod(self.eqn.invars[self.operand].aval.shape)


@dataclasses.dataclass(frozen=True)
class Way:
    """How one parameter's statistics are computed, and why."""

    kind: str
    reason: str
    uses: tuple[Use, ...] = ()


def tag(kind: Any) -> str:
    """Return the tag of what is known of an operand."""
    return VIEW if isinstance(kind, View) else kind


class Follower:
    """One pass over a jaxpr: collects uses of views and refusals."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.refused: dict[int, str] = {}
        self._levels = itertools.count(1)

    def follow(self, jaxpr: Any, kinds: Sequence[Any]) -> list[Any]:
        """Return the kinds of the outputs of a jaxpr, from those of its inputs."""
        env = dict(zip(jaxpr.invars, kinds, strict=True))
        env |= dict.fromkeys(jaxpr.constvars, CONST)

        def read(atom: Any) -> Any:
            return CONST if _jaxpr.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            found = self._apply(eqn, [read(x) for x in eqn.invars])
            env |= dict(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _apply(self, eqn: Any, kinds: list[Any]) -> list[Any]:
        name = rule(eqn, [tag(k) for k in kinds])
        views = [k for k in kinds if isinstance(k, View)]
        if name == "inner":
            return self.follow(_jaxpr.inner_jaxpr(eqn), kinds)
        if name == "scan":
            return self._scan(eqn, kinds)
        if name in ("view", "scale"):
            return self._moved(eqn, views, name)
        if name in ("plain", "stop"):
            return [BATCHED if BATCHED in kinds else CONST] * len(eqn.outvars)
        self._use(name, eqn, kinds)
        if name == "refuse":
            self._refuse(views, f"used by `{eqn.primitive.name}`")
        return [BATCHED] * len(eqn.outvars)

    def _use(self, name: str, eqn: Any, kinds: Sequence[Any]) -> None:
        for index, kind in enumerate(kinds):
            if isinstance(kind, View):
                self.uses.append(Use(kind, name, eqn, index))

    def _refuse(self, views: Sequence[View], reason: str) -> None:
        for root in frozenset().union(*(v.roots for v in views)):
            self.refused.setdefault(root, reason)

    def _moved(self, eqn: Any, views: list[View], name: str) -> list[View]:
        roots = frozenset().union(*(v.roots for v in views))
        scaled = any(v.scaled for v in views) or eqn.primitive.name in ("mul", "div")
        if scaled and len(views) > 1:
            self._refuse(views, "multiples are joined, whose norms differ")

        def numbers(index: int) -> np.ndarray:
            held = [v.numbers() for v in views]
            if name == "scale" or eqn.primitive.name in CASTS:
                return held[0]
            literals = [x.val for x in eqn.invars if _jaxpr.is_literal(x)]
            with jax.ensure_compile_time_eval():
                return np.asarray(_jaxpr.bind(eqn, *map(jax.numpy.asarray, held), *literals)[index])

        joined = len(views) > 1 or views[0].joined
        return [
            View(roots, views[0].level, lambda i=i: numbers(i), scaled, joined)
            for i in range(len(eqn.outvars))
        ]

    def _scan(self, eqn: Any, kinds: list[Any]) -> list[Any]:
        consts, carry, xs = scan_parts(eqn, kinds)
        for part, reason in ((consts, "a constant of `scan`"), (carry, "carried by `scan`")):
            self._refuse([k for k in part if isinstance(k, View)], f"{reason}: used at every step")
        self._use("scan", eqn, [*[None] * len((*consts, *carry)), *xs])
        body = _jaxpr.open_jaxpr(eqn.params["jaxpr"])[0]
        level, offset, inner = next(self._levels), 0, []
        for kind, var in zip(xs, body.invars[len(consts) + len(carry) :], strict=True):
            if isinstance(kind, View):
                kind = whole(kind.roots, var.aval.shape, level, offset, kind.scaled)
                offset += math.prod(var.aval.shape)
            inner.append(kind)
        known = [BATCHED if isinstance(k, View) else k for k in (*consts, *carry)]
        carry = settled_carry(eqn, [*known, *inner])
        out = self.follow(body, [*known[: len(consts)], *carry, *inner])
        self._refuse([k for k in out if isinstance(k, View)], "returned by the body of `scan`")
        return [BATCHED if isinstance(k, View) else k for k in out]


def whole(
    roots: frozenset[int], shape: tuple[int, ...], level: int, offset: int, scaled: bool = False
) -> View:
    """Return the view that holds all numbers of an array."""
    size = math.prod(shape)
    return View(roots, level, lambda: np.arange(offset, offset + size).reshape(shape), scaled)


def scan_parts(eqn: Any, values: Sequence[Any]) -> tuple[list, list, list]:
    """Constants, carry and scanned-over operands of a `scan`."""
    consts, carry = _jaxpr.scan_counts(eqn)
    end = consts + carry
    return list(values[:consts]), list(values[consts:end]), list(values[end:])


def settled_carry(eqn: Any, kinds: Sequence[Any]) -> list[Any]:
    """Return the kinds of the carry: what starts constant may come to depend on the example."""
    body = _jaxpr.open_jaxpr(eqn.params["jaxpr"])[0]
    consts, carry, xs = scan_parts(eqn, kinds)
    while True:
        out = Follower().follow(body, [*consts, *carry, *xs])[: len(carry)]
        grown = [BATCHED if BATCHED in (k, tag(o)) else k for k, o in zip(carry, out, strict=True)]
        if grown == carry:
            return carry
        carry = grown


def plan(jaxpr: Any, shapes: Sequence[tuple[int, ...]]) -> list[Way]:
    """Return the way of every parameter.

    Args:
        jaxpr: of the loss of one example; its first inputs are the parameters.
        shapes: of the parameters.
    """
    offsets = [0, *itertools.accumulate(math.prod(s) for s in shapes)]
    refused: dict[int, str] = {}
    while True:
        kinds = [
            entering(i, shape, refused, offset)
            for i, (shape, offset) in enumerate(zip(shapes, offsets, strict=False))
        ]
        follower = Follower()
        kinds += [BATCHED] * (len(jaxpr.invars) - len(shapes))
        out = follower.follow(jaxpr, kinds)
        follower._refuse([k for k in out if isinstance(k, View)], "returned")
        found = follower.refused or tied(follower.uses)
        if not found:
            return ways(shapes, refused, follower.uses, jaxpr)
        refused |= found


def entering(index: int, shape: tuple[int, ...], refused: dict[int, str], offset: int) -> Any:
    """As what a parameter enters the loss."""
    if index not in refused:
        return whole(frozenset({index}), shape, 0, offset)
    return BATCHED if math.prod(shape) <= SMALL else CONST


def tied(uses: Sequence[Use]) -> dict[int, str]:
    """Parameters of which two uses, or one twice, touch the same number."""
    levels = collections.defaultdict(list)
    for use in uses:
        levels[use.view.level].append(use)
    found = {}
    for group in levels.values():
        count = collections.Counter(root for use in group for root in use.view.roots)
        for root, times in count.items():
            views = [use.view for use in group if root in use.view.roots]
            if times == 1 and not views[0].joined:
                continue
            together = np.concatenate([view.numbers().ravel() for view in views])
            if np.unique(together).size < together.size:
                found[root] = f"used {times} times" if times > 1 else "used twice in one place"
    return found


def ways(
    shapes: Sequence[tuple[int, ...]], refused: dict[int, str], uses: Sequence[Use], jaxpr: Any
) -> list[Way]:
    """Return the ways of a finished plan."""
    read = {id(x) for eqn in jaxpr.eqns for x in eqn.invars}
    sizes = [math.prod(shape) for shape in shapes]
    found = []
    for index, size in enumerate(sizes):
        mine = tuple(use for use in uses if index in use.view.roots)
        if index in refused:
            found.append(Way(COPY if size <= SMALL else CHUNKS, refused[index]))
        elif mine:
            found.append(Way(PLACES, ", ".join(sorted({use.by for use in mine})), mine))
        else:
            unused = id(jaxpr.invars[index]) not in read
            found.append(Way(UNUSED, "not used by the loss" if unused else "no gradient"))
    in_chunks = sum(n for n, way in zip(sizes, found, strict=True) if way.kind == CHUNKS)
    if not in_chunks or sum(sizes) > 2 * in_chunks:
        return found
    # Gradients of single examples are taken of most numbers anyway: the rest joins them.
    joined = "joins the larger part"
    return [
        Way(CHUNKS, way.reason if way.kind != PLACES else joined) if way.kind != UNUSED else way
        for way in found
    ]


def extra_work(way: Way, size: int, batch: int) -> int:
    """Multiply-adds beyond one gradient, roughly, for a batch of this many examples."""
    if way.kind in (COPY, CHUNKS):
        return batch * size
    return sum(_extra_work(use, batch) for use in way.uses)


def _extra_work(use: Use, batch: int) -> int:
    if use.by == "scan":
        return 0
    if use.by == "lookup":
        tokens = math.prod(use.eqn.invars[1].aval.shape[:-1])
        return batch * tokens * math.prod(use.eqn.outvars[0].aval.shape)
    return batch * use.size
