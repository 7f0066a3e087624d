"""How a posterior is found inside any optimizer state, and what may be asked of it.

A state that carries a posterior is a NamedTuple with a field `reader`: a small static object with
the protocol below. Chains, masks, partitions and wrappers keep it where they keep the state, so it
is searched for by what it is, never by position or class name. Everything that a reader returns is
a tree like the part of the parameters that its state knows, with `MaskedNode` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import optax

from blr_optax._validate import unwritten

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._distribution import Distribution
    from blr_optax._typing import Hyperparameter, OptState, Params, PyTree, Scalar, Updates

NO_POSTERIOR = (
    "{who}: the optimizer state carries no posterior. Pass the state of one of this library's "
    "transformations (ivon, adam, blr_update, ...), also inside chain, masked or partition."
)


class Reader:
    """Base of all readers: as it is, of an optimizer that evaluates the loss at its parameters."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Readers ride in states as static pytree nodes."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def __eq__(self, other: object) -> bool:
        """Readers without choices of their own are equal by type; those with are dataclasses."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        """Of the type."""
        return hash(type(self))

    evaluates_loss = False  # whether the transformation evaluates the loss itself
    by_example = False  # whether its statistic is that of single examples, see `per_example`
    adversarial = False  # whether it takes a second gradient, at `adversary`
    noise_axes = 0  # leading axes of noise and statistic, for more than one draw per weight
    aux_argument: str | None = None  # the argument of `update` that is the loss's auxiliary output

    def core(self, state: OptState) -> OptState:
        """Return the state that holds key, count, ess and precision: `state`, or one inside it."""
        return state

    def with_core(self, state: OptState, core: OptState) -> OptState:
        """`state` with another `core`."""
        return core

    def part(self, state: OptState, params: Params) -> PyTree:
        """Return the leaves of params that the state knows, `MaskedNode` elsewhere."""
        return params

    def noise(self, state: OptState, key: Array) -> PyTree:
        """Return standard normals for one draw, or None for a point."""
        return None

    def weights(self, state: OptState, params: Params, noise: PyTree) -> PyTree:
        """Return the weights at which the loss is evaluated."""
        return params

    def curvature(self, state: OptState, params: Params, weights: PyTree, grads: Updates) -> PyTree:
        """Curvature per example from a gradient at `weights`, or None."""
        return None

    def adversary(self, state: OptState, params: Params, grads: Updates) -> PyTree:
        """Return the weights of the second gradient, from the gradient at `weights`."""
        raise unwritten(self, "adversary(self, state, params, grads)", "api/rule")

    def statistic(
        self, state: OptState, params: Params, weights: PyTree, grads: Updates, noise: PyTree
    ) -> PyTree:
        """Return what `estimate` averages for `update`: by default the curvature."""
        return self.curvature(state, params, weights, grads)

    def corrections(
        self,
        before: OptState,
        after: OptState,
        b2: Scalar,
        statistic: PyTree,
        weight_decay: Hyperparameter,
    ) -> tuple[Array | None, Array | None]:
        """Shares of a second-order term in a step of the precision and in the precision itself."""
        return None, None

    def relative_statistic(
        self,
        before: OptState,
        after: OptState,
        b2: Hyperparameter,
        weight_decay: Hyperparameter,
    ) -> PyTree:
        """Return c / p of a step, from the states around it; None unless c depends on the noise."""
        return None

    def statistic_over_precision(
        self, state: OptState, statistic: PyTree, weight_decay: Hyperparameter
    ) -> Array | None:
        """Return sum (c + d0) / sum p, from a statistic; None where no precision is kept."""
        return None

    def learnt(
        self, before: OptState, after: OptState, b2: Hyperparameter, weight_decay: Hyperparameter
    ) -> Array | None:
        """Return the share of coordinates that the data have moved; None without a precision."""
        return None

    def decay_of_step(
        self, state: OptState, params: Params, weight_decay: Hyperparameter
    ) -> Hyperparameter:
        """Return the weight decay of the coming step, where it depends on the posterior."""
        return weight_decay

    def variance(self, state: OptState, params: Params, q: Distribution) -> PyTree:
        """Return the variance of the weights around params, from q; None where params are none."""
        return q.family.variance(q.natural)

    def posterior(self, state: OptState, params: Params) -> Distribution:
        """q, over the leaves that the state knows."""
        raise unwritten(self, "posterior(self, state, params)", "api/rule")


class OuterReader(Reader):
    """Base of the readers of states around another posterior state, read as that one by default.

    Attributes:
        inside: the field that holds the inner state.
    """

    inside: ClassVar[str]

    def core(self, state: OptState) -> OptState:
        return getattr(state, self.inside)

    def with_core(self, state: OptState, core: OptState) -> OptState:
        return state._replace(**{self.inside: core})

    def part(self, state: OptState, params: Params) -> PyTree:
        core = self.core(state)
        return core.reader.part(core, params)

    def noise(self, state: OptState, key: Array) -> PyTree:
        core = self.core(state)
        return core.reader.noise(core, key)

    def weights(self, state: OptState, params: Params, noise: PyTree) -> PyTree:
        core = self.core(state)
        return core.reader.weights(core, params, noise)

    def curvature(self, state: OptState, params: Params, weights: PyTree, grads: Updates) -> PyTree:
        core = self.core(state)
        return core.reader.curvature(core, params, weights, grads)

    def corrections(
        self,
        before: OptState,
        after: OptState,
        b2: Scalar,
        statistic: PyTree,
        weight_decay: Hyperparameter,
    ) -> tuple[Array | None, Array | None]:
        old, new = self.core(before), self.core(after)
        return new.reader.corrections(old, new, b2, statistic, weight_decay)

    def relative_statistic(
        self,
        before: OptState,
        after: OptState,
        b2: Hyperparameter,
        weight_decay: Hyperparameter,
    ) -> PyTree:
        old, new = self.core(before), self.core(after)
        return new.reader.relative_statistic(old, new, b2, weight_decay)

    def statistic_over_precision(
        self, state: OptState, statistic: PyTree, weight_decay: Hyperparameter
    ) -> Array | None:
        core = self.core(state)
        return core.reader.statistic_over_precision(core, statistic, weight_decay)

    def learnt(
        self, before: OptState, after: OptState, b2: Hyperparameter, weight_decay: Hyperparameter
    ) -> Array | None:
        old, new = self.core(before), self.core(after)
        return new.reader.learnt(old, new, b2, weight_decay)

    def decay_of_step(
        self, state: OptState, params: Params, weight_decay: Hyperparameter
    ) -> Hyperparameter:
        core = self.core(state)
        return core.reader.decay_of_step(core, params, weight_decay)


def draws_noise(state: OptState) -> bool:
    """Whether a state that carries a posterior has a key, to draw samples with."""
    return hasattr(state.reader.core(state), "key")


def carries_posterior(node: Any) -> bool:
    """Whether a node of a state is one that carries a posterior."""
    return isinstance(getattr(node, "reader", None), Reader)


def find_posterior_states(opt_state: OptState) -> list[PyTree]:
    """Return all states in `opt_state` that carry a posterior."""
    nodes = jax.tree.leaves(opt_state, is_leaf=carries_posterior)
    return [node for node in nodes if carries_posterior(node)]


def posterior_states(opt_state: OptState, who: str, params: Params = None) -> list[PyTree]:
    """Return all states in `opt_state` that carry a posterior.

    Raises:
        ValueError: when there is none; with `params` also when both are swapped.
    """
    found = find_posterior_states(opt_state)
    if found:
        refuse_variables(who, found)
        return found
    if isinstance(opt_state, (optax.GradientTransformation, optax.MultiSteps)):
        raise ValueError(
            f"{who}: got the optimizer itself; pass its state, which tx.init(params) makes and "
            "tx.update returns."
        )
    if find_posterior_states(params):
        raise ValueError(
            f"{who}: the state stands where the parameters belong; the order is "
            "(opt_state, params)."
        )
    if type(opt_state).__name__ == "Distribution":
        raise ValueError(
            f"{who}: got a Distribution, which is a posterior already; pass the optimizer state, "
            "or use q.mean, q.variance, q.sample(key)."
        )
    raise ValueError(NO_POSTERIOR.format(who=who))


def refuse_variables(who: str, states: list[PyTree]) -> None:
    """Raise ValueError for the state of an optimizer of Flax nnx as it is: variables, no arrays.

    They are views that change in place. (Parameters may be variables, if the state is made of them:
    `nnx.split` gives such, and they are trees.)
    """
    held = [field for state in states for field in state.reader.core(state)]
    if any(map(_is_variable, held)):
        raise ValueError(
            f"{who}: the state holds variables of Flax nnx, no arrays. Give copies, "
            "nnx.as_pure(optimizer.opt_state) and nnx.as_pure(nnx.state(model, nnx.Param)); or use "
            "blr.nnx, whose sampled, make_step and posterior take the model and its optimizer."
        )


def _is_variable(node: Any) -> bool:
    return type(node).__module__.startswith("flax.nnx") and hasattr(node, "get_metadata")


def refuse_one_gradient(reader: Reader, statistic: PyTree) -> None:
    """Raise ValueError when an update of two gradients gets no sign that there were two."""
    if reader.adversarial and statistic is None:
        raise ValueError(
            "sam, bsam: a step takes two gradients, the second at the adversary of the first. Take "
            "both from est = blr.estimate(loss, opt_state, params, *batch), then "
            "tx.update(est.grad, opt_state, params, statistic=est.statistic)."
        )


def check_transformation(who: str, tx: Any) -> None:
    """Raise ValueError for what is not a transformation, such as `optax.adam` without a rate."""
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"{who}: the optimizer must be a transformation such as optax.adam(1e-3); got {tx!r}."
        )


def refuse_own_weights(state: OptState, who: str) -> None:
    """Raise ValueError when a wrapped optimizer takes gradients elsewhere than at params."""
    readers = [x.reader for x in jax.tree.leaves(state, is_leaf=carries_posterior)
             if carries_posterior(x) and (draws_noise(x) or x.reader.adversarial)]  # fmt: skip
    if readers:
        raise ValueError(
            f"{who}: the inner optimizer ({type(readers[0]).__name__}) samples its weights or "
            "moves them itself; give one that evaluates the loss at its parameters, such as "
            "blr.sgd, blr.adam or one of optax."
        )


def refuse_multi_steps(opt_state: OptState, who: str) -> None:
    """Raise ValueError when a `MultiSteps` state is anywhere in `opt_state`."""

    def is_multi(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    if any(is_multi(node) for node in jax.tree.leaves(opt_state, is_leaf=is_multi)):
        raise ValueError(
            f"{who}: this is the state of optax.MultiSteps, which would pass on the statistic of "
            "the last micro-batch only. Drop MultiSteps and accumulate with microbatch= instead; "
            "or, but for sam, bsam, vogn and ogn, take the gradient at sample(opt_state, params) "
            "without an estimate."
        )


def map_posterior_states(f: Callable[[PyTree], PyTree], opt_state: OptState) -> PyTree:
    """`opt_state` with f applied to every state that carries a posterior."""
    return jax.tree.map(
        lambda node: f(node) if carries_posterior(node) else node,
        opt_state,
        is_leaf=carries_posterior,
    )
