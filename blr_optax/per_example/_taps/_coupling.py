"""Losses whose examples see each other, found from shapes alone.

The loss is traced at two prime batch sizes. An axis of examples is one that grows with the batch,
a number that depends on the batch size one that differs, and every number is followed:

    const   does not depend on the examples        index   the positions 0, 1, ... of the examples
    each    one for each example                   sum     a sum over the examples
    mixed   an example meets another: refused      unsure  could not be followed

A per-example gradient exists when the loss is sum_i l_i / B. Batch normalisation is `each` minus
`sum`, a contrastive loss has two axes of examples, a loss divided by its number of tokens divides
a sum by a sum. What `custom_vjp` does in its backward pass is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from blr_optax import _loops
from blr_optax.per_example._taps import _jaxpr
from blr_optax.per_example._taps._plan import scan_parts
from blr_optax.per_example._taps._primitives import (
    ALONG,
    CALLS,
    ELEMENTWISE,
    KNOWN,
    LINEAR,
    MATRIX,
    POWERS,
    STILL_INDEX,
)

PRIMES = (1009, 1613)  # far enough apart for their powers to differ in bfloat16


class Kind(NamedTuple):
    """What is known of a number; see the module.

    Attributes:
        tag: as above.
        power: of the batch size by which it was multiplied; None if unknown.
        reason: for mixed and unsure; MOVED for positions other than the example's own.
        outer: how many blocks of examples its axis of examples holds, [T, B] made one axis has T.
    """

    tag: str
    power: float | None = 0
    reason: str = ""
    outer: int = 1


CONST, INDEX = Kind("const"), Kind("index")
ZERO = Kind("const", reason="zero")
POSITIONS = "positions"  # the reason of indices that hold the examples' positions
MOVED = Kind("index", reason="moved")
RANK = ("const", "index", "each", "sum", "unsure", "mixed")
LOOP = "a loop over the examples"
UNEVEN = Kind("mixed", reason="it adds terms that grow differently with the batch")
BRANCHES = Kind("unsure", None, "its operations change with the batch size")


def coupling(loss: Callable[..., Any], params: Any, batch: tuple) -> Kind:
    """How the loss depends on the examples of a batch; `sum` with power -1 is a mean."""

    def at(size: int) -> tuple[Any, Sequence[Any]]:
        def sized(x: Any) -> Any:  # in the dtype that jax computes in: numpy's may be wider
            return _loops.shaped(x, (size, *x.shape[1:]))

        many = jax.tree.map(sized, batch)
        return _jaxpr.open_jaxpr(_jaxpr.trace(loss, params, *many)[0])

    (jaxpr, consts), (twin, twins) = map(at, PRIMES)
    leaves = len(jax.tree.leaves(params))
    kinds = [CONST] * leaves + [Kind("each")] * (len(jaxpr.invars) - leaves)
    if len(consts) != len(twins):
        return BRANCHES
    return Follower({}).follow(jaxpr, twin, kinds, list(map(constant, consts, twins)))[0]


def constant(x: Any, twin: Any) -> Kind:
    """Classify a number that the loss closes over, from its values at both batch sizes."""
    if x is twin and np.size(x) > 1:  # frozen weights, say: no need to look at them
        return CONST
    if any(isinstance(v, jax.core.Tracer) or not _is_number(v) for v in (x, twin)):
        return CONST
    a, b = (np.asarray(v) for v in (x, twin))
    if not (a.any() or b.any()):
        return ZERO
    if a.shape != b.shape:  # one for each example
        same = a.size and b.size and np.all(a == a.flat[0]) and np.all(b == b.flat[0])
        if not same:
            return MOVED
        a, b = a.flat[0], b.flat[0]
    if np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"):
        return CONST
    a, b = np.abs(np.float64(a)), np.abs(np.float64(b))
    with np.errstate(all="ignore"):
        powers = np.log(b / a) / math.log(PRIMES[1] / PRIMES[0])
        power = float(np.round(2 * np.mean(powers)) / 2)
        fits = np.all(np.isfinite(powers)) and np.all(np.abs(powers - power) < 0.02)
    return Kind("const", power if fits else None)


def _is_number(x: Any) -> bool:
    return jax.numpy.issubdtype(jax.numpy.result_type(x), np.number)


def joined(kinds: Sequence[Kind]) -> Kind:
    """Return the kind of something that may be any of these."""
    top = max(kinds, key=lambda k: RANK.index(k.tag))
    powers = {k.power for k in kinds if k.tag == top.tag}
    return top if len(powers) == 1 else top._replace(power=None)


class Follower(NamedTuple):
    """Follows kinds through two jaxprs of one loss, traced at both batch sizes.

    Attributes:
        twins: the variable of the second jaxpr for each of the first.
    """

    twins: dict[Any, Any]

    def follow(
        self, jaxpr: Any, twin: Any, kinds: Sequence[Kind], consts: Sequence[Kind] | None = None
    ) -> list[Kind]:
        """Return the kinds of the outputs of a jaxpr."""
        env = dict(zip(jaxpr.invars, kinds, strict=True))
        env |= dict(zip(jaxpr.constvars, consts or [CONST] * len(jaxpr.constvars), strict=True))
        self._pair([*jaxpr.invars, *jaxpr.constvars], [*twin.invars, *twin.constvars])

        def read(atom: Any, twin: Any) -> Kind:
            if not _jaxpr.is_literal(atom):
                return env[atom]
            return constant(atom.val, twin.val) if _jaxpr.is_literal(twin) else BRANCHES

        names = [[eqn.primitive.name for eqn in x.eqns] for x in (jaxpr, twin)]
        if names[0] != names[1]:
            return [BRANCHES] * len(jaxpr.outvars)
        for eqn, other in zip(jaxpr.eqns, twin.eqns, strict=True):
            self._pair(eqn.outvars, other.outvars)
            found = self._apply(eqn, other, list(map(read, eqn.invars, other.invars)))
            env |= dict(zip(eqn.outvars, found, strict=True))
        return list(map(read, jaxpr.outvars, twin.outvars))

    def _pair(self, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
        self.twins.update(zip(ours, theirs, strict=True))

    def _axes(self, atom: Any) -> list[int]:
        """Return the axes of examples of an operand."""
        if _jaxpr.is_literal(atom):
            return []
        sizes = zip(atom.aval.shape, self.twins[atom].aval.shape, strict=True)
        return [i for i, (n, m) in enumerate(sizes) if n != m]

    def _apply(self, eqn: Any, twin: Any, kinds: list[Kind]) -> list[Kind]:
        name = eqn.primitive.name
        inner, other = (_jaxpr.inner_jaxpr(x) for x in (eqn, twin))
        if inner is None and name in CALLS:
            inner, other = (_jaxpr.open_jaxpr(x.params["call_jaxpr"])[0] for x in (eqn, twin))
        if inner is not None:
            return self.follow(inner, other, kinds)
        top = joined(kinds) if kinds else CONST
        if top.tag in ("mixed", "unsure"):
            return [top] * len(eqn.outvars)
        if name == "scan":
            return self._scan(eqn, twin, kinds)
        if name == "while":
            return self._while(eqn, twin, kinds)
        if name == "cond":
            branches = zip(eqn.params["branches"], twin.params["branches"], strict=True)
            outs = [self.follow(*(_jaxpr.open_jaxpr(x)[0] for x in b), kinds[1:]) for b in branches]
            return [joined([*k, kinds[0]]) for k in zip(*outs, strict=True)]
        return [self._one(eqn, kinds, top, out) for out in eqn.outvars]

    def _one(self, eqn: Any, kinds: list[Kind], top: Kind, out: Any) -> Kind:
        name = eqn.primitive.name
        if name == "iota":
            return INDEX if eqn.params["dimension"] in self._axes(out) else CONST
        if top.tag == "index":
            return self._of_index(eqn, kinds)
        if top.tag == "const":
            if name.startswith("cum") and self._along(eqn):
                return MOVED  # ones added up along the examples are their positions
            zero = name in LINEAR and all(k == ZERO for k in kinds)
            return ZERO if zero else Kind("const", self._power(eqn, kinds))
        if any(k.tag == "sum" for k in kinds):
            return self._of_sums(eqn, kinds)
        return self._of_each(eqn, kinds, out)

    def _of_index(self, eqn: Any, kinds: list[Kind]) -> Kind:
        """Positions, unless something is made of them; i + B is what indexing asks of i < 0."""
        name = eqn.primitive.name
        literals = [x.val for x in eqn.invars if _jaxpr.is_literal(x)]
        if name not in STILL_INDEX:
            return MOVED if name in ELEMENTWISE else CONST
        same = name != "add" or (literals and literals[0] % PRIMES[0] == 0)
        return INDEX if same and MOVED not in kinds else MOVED

    def _power(self, eqn: Any, kinds: list[Kind]) -> float | None:
        """Of the batch size in what an equation makes of numbers that were multiplied by it."""
        name = eqn.primitive.name
        powers: list[Any] = [k.power for k in kinds]
        if None in powers:
            return None
        total = sum(powers)
        if name == "dot_general":
            counted = any(set(c) & set(self._axes(x)) for x, c in zip(
                eqn.invars, eqn.params["dimension_numbers"][0], strict=True))  # fmt: skip
            return total + counted if all(k.tag == "const" for k in kinds) else total
        if name == "reduce_sum" and kinds[0].tag == "const":  # ones summed are their number
            return total + bool(set(eqn.params["axes"]) & set(self._axes(eqn.invars[0])))
        if name in ("mul", "conv_general_dilated"):
            return total
        if name == "div":
            return powers[0] - powers[1]
        if name in POWERS:
            return powers[0] * POWERS[name]
        if name == "integer_pow":
            return powers[0] * eqn.params["y"]
        if name == "select_n":
            powers = powers[1:]
        if name in LINEAR and len({*powers}) == 1:
            return powers[0]
        return None if any(powers) else 0

    def _of_sums(self, eqn: Any, kinds: list[Kind]) -> Kind:
        """Allow sums over the examples to be added up and multiplied by numbers, nothing else."""
        name = eqn.primitive.name
        sums = [k for k in kinds if k.tag == "sum"]
        numbers = [k for k in kinds if k.tag == "const"]
        if any(k.tag == "each" for k in kinds):
            return Kind("mixed", reason=f"`{name}` of an example and a sum over the examples")
        if (name in ("mul", "dot_general") and len(sums) == 1) or (
            name == "div" and kinds[1].tag == "const"
        ):
            return Kind("sum", self._power(eqn, kinds))
        if not (name in LINEAR and (name != "select_n" or kinds[0].tag == "const")):
            return Kind("mixed", reason=f"`{name}` of a sum over the examples")
        powers = {k.power for k in sums}
        if name in ("add", "sub"):
            powers |= {None if k.power is None else k.power - 1 for k in numbers if k != ZERO}
        if None not in powers and len(powers) > 1:
            return UNEVEN
        return Kind("sum", None if None in powers else powers.pop())

    def _of_each(self, eqn: Any, kinds: list[Kind], out: Any) -> Kind:
        name = eqn.primitive.name
        each = [(x, k) for x, k in zip(eqn.invars, kinds, strict=True) if k.tag == "each"]
        of_index = any(k.tag == "index" for k in kinds)
        if of_index and name in (*ELEMENTWISE, "dot_general", "conv_general_dilated"):
            return Kind("mixed", reason=f"`{name}` of an example and its position in the batch")
        if len(self._axes(out)) > 1:
            return Kind("mixed", reason=f"`{name}` of every example with every other")
        outer = {k.outer for x, k in each if self._axes(x)}
        if len(outer) > 1 or self._mixes(eqn, kinds, out):
            return Kind("mixed", reason=f"`{name}` along the examples")
        if name not in KNOWN:
            return Kind("unsure", None, f"`{name}` of examples")
        power = self._power(eqn, kinds)
        if name == "concatenate" and INDEX in kinds:
            return Kind("each", power, POSITIONS)
        if self._axes(out):
            outer = self._blocks(eqn, each[0][1]) if name == "reshape" else max(outer, default=1)
            if not outer:
                return Kind("mixed", reason="`reshape` across the examples")
            return Kind("each", power, outer=outer)
        if name in ("reduce_sum", "dot_general") and any(self._axes(x) for x, _ in each):
            return Kind("sum", power)
        return Kind("mixed", reason=f"`{name}` over the examples")

    def _blocks(self, eqn: Any, kind: Kind) -> int:
        """How many blocks of examples the axis of a reshaped array holds; 0 where it mixes them."""
        (before,), (after,) = self._axes(eqn.invars[0]), self._axes(eqn.outvars[0])
        old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        outside, per_block = math.prod(old[:before]) * kind.outer, math.prod(new[:after])
        blocks, rest = divmod(outside, per_block)
        whole = not rest and blocks and (new[after] // PRIMES[0]) % blocks == 0
        return blocks if whole else 0

    def _along(self, eqn: Any) -> bool:
        """Whether an equation works along the axis of the examples."""
        along = eqn.params[ALONG[eqn.primitive.name]]
        along = along if isinstance(along, Sequence) else (along,)
        return bool(set(along) & {i for x in eqn.invars for i in self._axes(x)})

    def _mixes(self, eqn: Any, kinds: list[Kind], out: Any) -> bool:
        """Whether an equation brings different examples together without summing them up."""
        name, axes = eqn.primitive.name, self._axes(eqn.invars[0])
        if name in ALONG:
            return self._along(eqn)
        if name in MATRIX or name == "fft":
            last = MATRIX[name] if name in MATRIX else len(eqn.params["fft_lengths"])
            return any(i >= len(eqn.invars[0].aval.shape) - last for i in axes)
        if name.startswith("reduce_window"):
            return any(eqn.params["window_dimensions"][i] > 1 for i in axes)
        if name == "triangular_solve":
            ndim = len(eqn.invars[1].aval.shape)
            row = ndim - 2 if eqn.params["left_side"] else ndim - 1
            return row in self._axes(eqn.invars[1]) or bool({*axes} & {ndim - 1, ndim - 2})
        if name == "dot_general":
            (contract, batched) = eqn.params["dimension_numbers"]
            met = [set(self._axes(x)) & set(c) for x, c in zip(eqn.invars, contract, strict=True)]
            free = [set(self._axes(x)) - {*c, *b}
                    for x, c, b in zip(eqn.invars, contract, batched, strict=True)]  # fmt: skip
            return bool((any(met) and self._axes(out)) or all(free))
        if name == "conv_general_dilated":
            spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
            allowed = {spec.lhs_spec[0]}
            if groups % PRIMES[0] == 0:
                allowed.add(spec.lhs_spec[1])
            return not set(axes) <= allowed or eqn.params["batch_group_count"] > 1
        if name == "gather" and kinds[0].tag == "each":
            d = eqn.params["dimension_numbers"]
            met = set(axes) & {*d.start_index_map}
            whole = all(eqn.params["slice_sizes"][i] == eqn.invars[0].aval.shape[i] for i in met)
            ours = kinds[1] == INDEX or kinds[1].reason == POSITIONS  # l[arange(B), y]
            return bool(met) and not whole and not ours
        if name.startswith("scatter"):
            d = eqn.params["dimension_numbers"]
            met = set(axes) & {*d.scatter_dims_to_operand_dims}
            return bool(met) and not (kinds[1] == INDEX or kinds[1].reason == POSITIONS)
        if name in ("dynamic_slice", "dynamic_update_slice", "slice", "pad"):
            parts = eqn.invars[1] if name == "dynamic_update_slice" else out
            return any(parts.aval.shape[i] != eqn.invars[0].aval.shape[i] for i in axes)
        return False

    def _scan(self, eqn: Any, twin: Any, kinds: list[Kind]) -> list[Kind]:
        consts, carry, xs = scan_parts(eqn, kinds)
        if eqn.params["length"] != twin.params["length"]:  # a loop over the examples
            alone = not carry and all(k.tag == "const" for k in consts)
            found = Kind("each", None) if alone else Kind("unsure", None, LOOP)
            return [found] * len(eqn.outvars)
        body = [_jaxpr.open_jaxpr(x.params["jaxpr"])[0] for x in (eqn, twin)]
        carry, ys = self._settled(body, consts, carry, xs)
        return [*carry, *ys]

    def _while(self, eqn: Any, twin: Any, kinds: list[Kind]) -> list[Kind]:
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body = [_jaxpr.open_jaxpr(x.params["body_jaxpr"])[0] for x in (eqn, twin)]
        consts, carry = kinds[first : first + second], kinds[first + second :]
        return self._settled(body, consts, carry, [])[0]

    def _settled(
        self, body: Sequence[Any], consts: list[Kind], carry: list[Kind], xs: list[Kind]
    ) -> tuple[list[Kind], list[Kind]]:
        """Return the kinds of the carry once a loop changes them no more, and of the rest."""
        while True:
            out = self.follow(*body, [*consts, *carry, *xs])
            grown = [joined([a, b]) for a, b in zip(carry, out, strict=False)]
            if grown == carry:
                return carry, out[len(carry) :]
            carry = grown
