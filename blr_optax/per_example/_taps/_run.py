"""The loss of all examples at once, with taps where parameters meet activations.

The jaxpr of one example's loss is evaluated with values of three kinds: `Plain` (the same for all
examples), `Batch` (a leading axis of examples) and `Tapped` (a view of parameters with its shadow).
Every equation runs under `vmap`, unless a view is among its operands (`_rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _loops
from blr_optax.per_example._taps import _jaxpr, _places
from blr_optax.per_example._taps._equations import BATCHED, CASTS, CONST, VIEW, rule
from blr_optax.per_example._taps._moments import Shadow
from blr_optax.per_example._taps._plan import scan_parts, settled_carry, whole


class Plain(NamedTuple):
    """The same for all examples."""

    x: Any


class Batch(NamedTuple):
    """One for each example, along the leading axis."""

    x: Any


class Tapped(NamedTuple):
    """A view of parameters, and the zeros whose cotangents are its statistics."""

    x: Any
    shadow: Shadow


Value = Plain | Batch | Tapped
TAGS = {Plain: CONST, Batch: BATCHED, Tapped: VIEW}


class Runner(NamedTuple):
    """Evaluates jaxprs for a batch.

    Attributes:
        batch: how many examples.
        weights: of the examples, or None.
    """

    batch: int
    weights: Any

    def run(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
        """Return the outputs of a jaxpr."""
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, map(Plain, consts), strict=True))
        env |= dict(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return Plain(atom.val) if _jaxpr.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            found = self._apply(eqn, [read(x) for x in eqn.invars])
            env |= dict(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def copied(self, value: Value) -> Batch:
        """One for each example, of any value."""
        if isinstance(value, Batch):
            return value
        if isinstance(value, Plain):
            x = jnp.asarray(value.x)
            return Batch(jnp.broadcast_to(x, (self.batch, *x.shape)))
        return Batch(_places.copy(self.batch)(None, value.x, value.shadow, self.weights))

    def _apply(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = rule(eqn, [TAGS[type(v)] for v in values])
        if name == "inner":
            inner = _jaxpr.inner_jaxpr(eqn)
            return _jaxpr.checkpointed(eqn, lambda *v: self.run(inner, (), v))(*values)
        if name == "scan":
            return self._scan(eqn, values)
        if name == "stop":
            return [Plain(x) for x in jax.lax.stop_gradient(_jaxpr.bind(eqn, values[0].x))]
        if name == "view":
            return moved(eqn, values)
        if name == "scale":
            return [scaled(eqn, values)]
        if name in ("dense", "conv", "lookup"):
            return [self._meet(name, eqn, values)]
        if name == "copy":
            values = [self.copied(v) if isinstance(v, Tapped) else v for v in values]
        return plain(eqn, values)

    def _meet(self, name: str, eqn: Any, values: list[Value]) -> Batch:
        side = next(i for i, v in enumerate(values) if isinstance(v, Tapped))
        view: Any = values[side]
        other = self.copied(values[1 - side])
        make = {
            "dense": lambda: _places.dense(eqn, side),
            "conv": lambda: _places.convolution(eqn),
            "lookup": lambda: _places.lookup(eqn),
        }[name]
        return Batch(make()(other.x, view.x, view.shadow, self.weights))

    def _scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        body, body_consts = _jaxpr.open_jaxpr(eqn.params["jaxpr"])
        kinds = [TAGS[type(v)] for v in values]
        views = (whole(frozenset(), x.aval.shape[1:], 1, 0) for x in eqn.invars)
        kinds = [view if k == VIEW else k for k, view in zip(kinds, views, strict=True)]
        consts, carry, xs = scan_parts(eqn, values)
        settled = settled_carry(eqn, kinds)
        carry = [self.copied(v) if k == BATCHED else v for v, k in zip(carry, settled, strict=True)]
        scanned, norms = [scanned_over(v) for v in xs], [norms_of(v) for v in xs]

        def step(carry: list[Value], xs: list[Value]) -> tuple[list[Value], list[Value]]:
            layer = [with_norms(v, n) for v, n in zip(xs, norms, strict=True)]
            out = self.run(body, body_consts, [*consts, *carry, *layer])
            kept = [self.copied(v) if k == BATCHED else v
                    for v, k in zip(out, settled, strict=False)]  # fmt: skip
            return kept, out[len(kept) :]

        params = eqn.params
        carry, ys = _loops.scan(
            step, carry, scanned, params["length"], params["reverse"], params["unroll"]
        )
        return [
            *carry,
            *(Batch(jnp.moveaxis(v.x, 0, 1)) if isinstance(v, Batch) else v for v in ys),
        ]


def scanned_over(value: Value) -> Value:
    """Return an operand of a loop with its steps leading, and back; norms belong to no step."""
    if isinstance(value, Batch):
        return Batch(jnp.swapaxes(value.x, 0, 1))
    return with_norms(value, None)


def norms_of(value: Value) -> Any:
    """Return the norms of a view."""
    return value.shadow.norms if isinstance(value, Tapped) else None


def with_norms(value: Value, norms: Any) -> Value:
    """Return a view with other norms."""
    if not isinstance(value, Tapped):
        return value
    return Tapped(value.x, value.shadow._replace(norms=norms))


def plain(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Return an equation without views, under `vmap`."""
    axes = [0 if isinstance(v, Batch) else None for v in values]
    operands = [v.x for v in values]
    if 0 not in axes:
        return [Plain(x) for x in _jaxpr.bind(eqn, *operands)]
    return [Batch(x) for x in jax.vmap(lambda *xs: _jaxpr.bind(eqn, *xs), axes)(*operands)]


def moved(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Return a part or another shape of views; their shadows move with them, casts apart."""

    def at(operand: Callable[[Value], Any]) -> list[Any]:
        return _jaxpr.bind(eqn, *map(operand, values))

    def shadow(name: str) -> list[Any]:
        if getattr(first, name) is None:
            return [None] * len(found)
        return at(lambda v: getattr(v.shadow, name) if isinstance(v, Tapped) else v.x)

    view: Any = values[0]
    found, first = at(lambda v: v.x), view.shadow
    if eqn.primitive.name in CASTS:
        return [Tapped(found[0], first)]
    parts = zip(found, shadow("total"), shadow("squares"), strict=True)
    return [Tapped(x, first._replace(total=total, squares=squares)) for x, total, squares in parts]


def scaled(eqn: Any, values: Sequence[Value]) -> Tapped:
    """Return a number c times a view (c^2 times its squares), or a constant added to it."""
    (found,) = _jaxpr.bind(eqn, *(v.x for v in values))
    side = next(i for i, v in enumerate(values) if isinstance(v, Tapped))
    view: Any = values[side]
    name, shadow = eqn.primitive.name, view.shadow
    if name == "add" or (name == "sub" and side == 0):
        return Tapped(found, shadow)
    c = jnp.asarray(-1 if name in ("neg", "sub") else values[1 - side].x, shadow.dtype)
    c = jnp.reshape(1 / c if name == "div" else c, ())
    parts = zip(shadow[:3], (c, c * c, c * c), strict=True)
    return Tapped(found, Shadow(*(None if x is None else x * k for x, k in parts)))
