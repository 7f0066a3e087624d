"""Families, estimators and curvatures of users: what is missing is named, and how to write it."""

import ast
import dataclasses
import inspect
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import ROOT

import blr_optax as blr
from blr_optax import estimators, families
from blr_optax.families._base.conditional import ConditionalFamily
from blr_optax.families._lifts.independent import Independent
from blr_optax.families._lifts.viewed import Viewed
from blr_optax.optimizers._posteriors.moved_noise import Moved


@families.parameters
class ParetoNatural(NamedTuple):
    log: jax.Array


@families.parameters
class ParetoExpectation(NamedTuple):
    log: jax.Array


@dataclasses.dataclass(frozen=True)
class Pareto(families.ExponentialFamily):
    """On x > 1: log q = log a - (a + 1) log x; half of it is still to be written."""

    Natural, Expectation = ParetoNatural, ParetoExpectation
    domains: ClassVar[dict] = {"log": families.Domain(sign=-1)}
    constant_base_measure = False

    def natural(self, *, shape):
        return ParetoNatural(-jnp.asarray(shape))

    def log_partition(self, lam):
        return -jnp.log(-lam.log)

    def sufficient_statistics(self, theta, lam=None):
        return ParetoExpectation(jnp.log(theta))

    def log_base_measure(self, lam, theta):
        return -jnp.log(theta) + 0.0 * lam.log


@dataclasses.dataclass(frozen=True)
class Mine(estimators.Estimator):
    pass


@dataclasses.dataclass(frozen=True)
class Bent(estimators.Curvature):
    name = "bent"


class Empty(families.ExponentialFamily):
    pass


class Blocks(ConditionalFamily):
    pass


class Shown(Viewed):
    pass


class Rows(Independent):
    pass


class Noise(Moved):
    pass


class Read(blr.state.Reader):
    pass


class Point(blr.rule.PointReader):
    pass


Q = blr.Distribution(Pareto(), Pareto().natural(shape=3.0))
LAM = families.get("normal").natural(mean=0.0, precision=1.0)
ASKED = {
    "mean": lambda: Q.mean,
    "variance": lambda: Q.variance,
    "sample": lambda: Q.sample(0),
    "standard": Q.standard,
    "expected_log_base_measure": Q.entropy,
    "natural_gradient": lambda: estimators.natural_gradient("normal", jnp.sum, Mine())(None, LAM),
    "diagonal": lambda: estimators.natural_gradient(
        "normal", jnp.sum, estimators.monte_carlo(1, curvature=Bent())
    )(jax.random.key(0), LAM),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_missing_is_named_with_its_class_and_signature(name):
    with pytest.raises(NotImplementedError) as error:
        ASKED[name]()
    said = str(error.value)
    assert f"def {name}(self" in said and any(c in said for c in ("Pareto", "Mine", "Bent"))
    assert "docs/" in said


def test_what_is_written_works():
    """By hand: E[log x] = 1 / a, and log q(2) = log 3 - 4 log 2."""
    np.testing.assert_allclose(Q.expectation().log, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(Q.log_prob(2.0), np.log(3) - 4 * np.log(2), rtol=1e-6)


def missing_of(owner):
    """The methods of a class that only say what to write."""
    for name, method in inspect.getmembers(type(owner), inspect.isfunction):
        if "unwritten" in method.__code__.co_names:
            yield name, method


@pytest.mark.parametrize(
    "owner",
    [Empty(), Blocks(), Mine(), Bent(), Shown(), Rows(), Noise(None), Read(), Point()],
    ids=lambda x: type(x).__name__,
)
def test_signatures_in_the_words_are_those_of_the_methods(owner):
    found = list(missing_of(owner))
    assert found
    for name, method in found:
        parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
        needed = [
            p for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
        ]
        if name == "expected_log_base_measure":  # the default of a constant base measure
            continue
        with pytest.raises(NotImplementedError) as error:
            method(owner, *[None] * len(needed))
        said = str(error.value)
        signature = said.split("`def ")[1].split("`")[0]
        told = [
            part.split("=")[0].strip("* ") for part in signature[:-1].split("(", 1)[1].split(", ")
        ]
        assert told == ["self", *(p.name for p in parameters)], name
        assert signature.startswith(name) and type(owner).__name__ in said


def test_no_error_is_raised_without_words():
    silent = []
    for path in (ROOT / "blr_optax").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        # An error of a `try` that is caught where it is raised is none that a user sees.
        caught = {id(x) for node in nodes if isinstance(node, ast.Try) for x in walk(node.body)}
        silent += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in nodes
            if isinstance(node, ast.Raise) and wordless(node.exc) and id(node) not in caught
        ]
    assert silent == []


def walk(nodes):
    """All nodes below some."""
    return (x for node in nodes for x in ast.walk(node))


def wordless(raised):
    """Whether what is raised is a bare class of errors, or one made of nothing."""
    if isinstance(raised, ast.Call):
        return not raised.args and not raised.keywords
    return isinstance(raised, ast.Name) and raised.id.endswith("Error")


def test_pages_that_are_named_are_there():
    named = {
        node.args[-1].value if len(node.args) == 3 else "families"
        for path in (ROOT / "blr_optax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "unwritten"
    }
    assert named > {"families", "api/rule"}
    assert all((ROOT / "docs" / f"{page}.md").exists() for page in named)
