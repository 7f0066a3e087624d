"""Losses whose examples see each other, found from shapes alone.

The loss is traced at a prime batch size, so that an axis of examples is one whose size is a
multiple of it, and every number is followed:

    const   does not depend on the examples        index   the positions 0, 1, ... of the examples
    each    one for each example                   sum     a sum over the examples
    mixed   an example meets another: refused      unsure  could not be followed

A per-example gradient exists when the loss is sum_i l_i / B. Batch normalisation is `each` minus
`sum`, a contrastive loss has two axes of examples, a loss divided by its number of tokens divides
a sum by a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from blr_optax.estimators._taps import _jaxpr
from blr_optax.estimators._taps._plan import scan_parts

PRIMES = (1009, 1013, 10007)  # none of which is likely to divide a width


class Kind(NamedTuple):
    """What is known of a number; see the module.

    Attributes:
        tag: as above.
        power: of the batch size by which it was multiplied; None if unknown.
        reason: for mixed and unsure; MOVED for positions other than the example's own.
    """

    tag: str
    power: int | None = 0
    reason: str = ""


CONST, INDEX = Kind("const"), Kind("index")
POSITIONS = "positions"  # the reason of indices that hold the examples' positions
MOVED = Kind("index", reason="moved")
RANK = ("const", "index", "each", "sum", "unsure", "mixed")
LOOP = "a loop over the examples"
LINEAR = ("add", "sub", "neg", "reduce_sum", "convert_element_type", "reshape", "squeeze", "copy",
          "broadcast_in_dim", "expand_dims", "stop_gradient", "copy_p", "transpose")  # fmt: skip
LINEAR_IN_SUMS = (*LINEAR, "slice", "dynamic_slice", "gather", "concatenate", "rev", "split", "pad",
                  "stack", "unstack")  # fmt: skip
STILL_INDEX = ("add", "lt", "select_n", "broadcast_in_dim", "reshape", "convert_element_type",
               "squeeze", "transpose", "concatenate")  # fmt: skip
ELEMENTWISE = ("add", "sub", "mul", "div", "rem", "neg", "pow", "integer_pow", "exp", "max", "min",
               "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select_n")  # fmt: skip
# How many of the last axes are one matrix.
MATRIX = {"cholesky": 2, "lu": 2, "qr": 2, "geqrf": 2, "householder_product": 2, "eigh": 2,
          "eig": 2, "svd": 2, "schur": 2, "hessenberg": 2, "top_k": 1}  # fmt: skip
ALONG = {"rev": "dimensions", "sort": "dimension", "cumsum": "axis", "cumprod": "axis",
         "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis",
         "concatenate": "dimension"}  # fmt: skip
CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def coupling(loss: Callable[..., Any], params: Any, batch: tuple) -> Kind:
    """How the loss depends on the examples of a batch; `sum` with power -1 is a mean."""
    sizes = {n for x in jax.tree.leaves((params, batch)) for n in x.shape}
    prime = next(p for p in PRIMES if not any(n % p == 0 for n in sizes if n))
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((prime, *x.shape[1:]), x.dtype), batch)
    closed, _ = _jaxpr.trace(loss, params, *many)
    jaxpr, _ = _jaxpr.open_jaxpr(closed)
    leaves = len(jax.tree.leaves(params))
    kinds = [CONST] * leaves + [Kind("each")] * (len(jaxpr.invars) - leaves)
    return Follower(prime).follow(jaxpr, kinds)[0]


def joined(kinds: Sequence[Kind]) -> Kind:
    """The kind of something that may be any of these."""
    top = max(kinds, key=lambda k: RANK.index(k.tag))
    powers = {k.power for k in kinds if k.tag == top.tag}
    return top if len(powers) == 1 else top._replace(power=None)


class Follower(NamedTuple):
    """Follows kinds through a jaxpr traced at a prime batch size."""

    prime: int

    def follow(self, jaxpr: Any, kinds: Sequence[Kind]) -> list[Kind]:
        """The kinds of the outputs of a jaxpr."""
        env = dict(zip(jaxpr.invars, kinds, strict=True)) | dict.fromkeys(jaxpr.constvars, CONST)

        def read(atom: Any) -> Kind:
            return CONST if _jaxpr.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            found = self._apply(eqn, [read(x) for x in eqn.invars])
            env |= dict(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _axes(self, atom: Any) -> list[int]:
        """The axes of examples of an operand."""
        return [i for i, n in enumerate(atom.aval.shape) if n and n % self.prime == 0]

    def _apply(self, eqn: Any, kinds: list[Kind]) -> list[Kind]:
        name = eqn.primitive.name
        inner = _jaxpr.inner_jaxpr(eqn)
        if inner is None and name in CALLS:
            inner = _jaxpr.open_jaxpr(eqn.params["call_jaxpr"])[0]
        if inner is not None:
            return self.follow(inner, kinds)
        top = joined(kinds) if kinds else CONST
        if top.tag in ("mixed", "unsure"):
            return [top] * len(eqn.outvars)
        if name == "scan":
            return self._scan(eqn, kinds)
        if name == "cond":
            branches = [_jaxpr.open_jaxpr(b)[0] for b in eqn.params["branches"]]
            outs = [self.follow(b, kinds[1:]) for b in branches]
            return [joined([*k, kinds[0]]) for k in zip(*outs, strict=True)]
        return [self._one(eqn, kinds, top, out) for out in eqn.outvars]

    def _one(self, eqn: Any, kinds: list[Kind], top: Kind, out: Any) -> Kind:
        name = eqn.primitive.name
        if name == "iota":
            return INDEX if self._axes(out) else CONST
        if top.tag == "index":
            return self._of_index(eqn, kinds)
        if top.tag == "const":  # ones summed over the examples are their number
            counted = name == "reduce_sum" and any(map(self._axes, eqn.invars))
            return Kind("const", None) if counted else top
        if any(k.tag == "sum" for k in kinds):
            return self._of_sums(eqn, kinds)
        return self._of_each(eqn, kinds, out)

    def _of_index(self, eqn: Any, kinds: list[Kind]) -> Kind:
        """Positions, unless something is made of them; i + B is what indexing asks of i < 0."""
        name = eqn.primitive.name
        literals = [x.val for x in eqn.invars if _jaxpr.is_literal(x)]
        if name not in STILL_INDEX:
            return MOVED if name in ELEMENTWISE else CONST
        same = name != "add" or (literals and literals[0] % self.prime == 0)
        return INDEX if same and MOVED not in kinds else MOVED

    def _of_sums(self, eqn: Any, kinds: list[Kind]) -> Kind:
        """Sums over the examples may only be added up and multiplied by numbers."""
        name = eqn.primitive.name
        sums = [k for k in kinds if k.tag == "sum"]
        if any(k.tag == "each" for k in kinds):
            return Kind("mixed", reason=f"`{name}` of an example and a sum over the examples")
        powers = {k.power for k in sums}
        power = None if None in powers else max(powers, key=lambda p: (p != -1, p))
        still = kinds[0].tag == "const" if name == "select_n" else name in LINEAR_IN_SUMS
        if still or (name == "dot_general" and len(sums) == 1):
            return Kind("sum", power)
        if (name == "mul" and len(sums) == 1) or (name == "div" and kinds[1].tag == "const"):
            return Kind("sum", self._scaled(eqn, kinds, power))
        return Kind("mixed", reason=f"`{name}` of a sum over the examples")

    def _scaled(self, eqn: Any, kinds: list[Kind], power: int | None) -> int | None:
        """The power after a product with, or a division by, a number."""
        literals = [x for x in eqn.invars if _jaxpr.is_literal(x)]
        if power is None or eqn.primitive.name not in ("mul", "div"):
            return power
        if Kind("const", None) in kinds:
            return None
        if not literals:  # a constant for every example may hold anything
            constants = [x for x, k in zip(eqn.invars, kinds, strict=True) if k.tag == "const"]
            return None if any(map(self._axes, constants)) else power
        number = float(literals[0].val)
        if eqn.primitive.name == "div" and number:
            number = 1 / number
        multiples = 1 / (number * self.prime) if number else 0.0
        return power - 1 if multiples >= 0.5 and abs(multiples - round(multiples)) < 1e-4 else power

    def _of_each(self, eqn: Any, kinds: list[Kind], out: Any) -> Kind:
        name = eqn.primitive.name
        each = [x for x, k in zip(eqn.invars, kinds, strict=True) if k.tag == "each"]
        power = joined(kinds).power
        if name in ELEMENTWISE and any(k.tag == "index" for k in kinds):
            return Kind("mixed", reason=f"`{name}` of an example and its position in the batch")
        if len(self._axes(out)) > 1:
            return Kind("mixed", reason=f"`{name}` of every example with every other")
        if self._mixes(eqn, kinds, out):
            return Kind("mixed", reason=f"`{name}` along the examples")
        if name == "concatenate" and INDEX in kinds:
            return Kind("each", power, POSITIONS)
        if self._axes(out):
            linear = name in (*LINEAR, "mul", "div", "select_n", "gather", "transpose")
            scaled = self._scaled(eqn, kinds, power)
            return Kind("each", scaled if linear or scaled == 0 else None)
        if name in ("reduce_sum", "dot_general") and any(map(self._axes, each)):
            return Kind("sum", power)
        if name == "while":
            return Kind("unsure", None, LOOP)
        return Kind("mixed", reason=f"`{name}` over the examples")

    def _mixes(self, eqn: Any, kinds: list[Kind], out: Any) -> bool:
        """Whether an equation brings different examples together without summing them up."""
        name, axes = eqn.primitive.name, self._axes(eqn.invars[0])
        if name in ALONG:
            along = eqn.params[ALONG[name]]
            along = along if isinstance(along, Sequence) else (along,)
            return bool(set(along) & {i for x in eqn.invars for i in self._axes(x)})
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
            if groups % self.prime == 0:
                allowed.add(spec.lhs_spec[1])
            return not set(axes) <= allowed
        if name == "gather" and kinds[0].tag == "each":
            d = eqn.params["dimension_numbers"]
            met = set(axes) & {*d.start_index_map}
            whole = all(eqn.params["slice_sizes"][i] == eqn.invars[0].aval.shape[i] for i in met)
            ours = kinds[1] == INDEX or kinds[1].reason == POSITIONS  # l[arange(B), y]
            return bool(met) and not whole and not ours
        return False

    def _scan(self, eqn: Any, kinds: list[Kind]) -> list[Kind]:
        body = _jaxpr.open_jaxpr(eqn.params["jaxpr"])[0]
        consts, carry, xs = scan_parts(eqn, kinds)
        if eqn.params["length"] % self.prime == 0:  # a loop over the examples
            alone = not carry and all(k.tag == "const" for k in consts)
            found = Kind("each", None) if alone else Kind("unsure", None, LOOP)
            return [found] * len(eqn.outvars)
        while True:
            out = self.follow(body, [*consts, *carry, *xs])
            grown = [joined([a, b]) for a, b in zip(carry, out, strict=False)]
            if grown == carry:
                return [*carry, *out[len(carry) :]]
            carry = grown
