"""`check` has no warning about the recipes' set-ups, and names what a first day does to them.

A recipe is run up to its training loop, and what `check` takes is read from its names. Mistakes
are made as users make them: an edited line, or another loss or chain around what is there.
"""

import ast
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from test_pages_long import FACTS, Names, programs

import blr_optax as blr
from blr_optax.families._base import registry

Case = tuple[tuple, dict[str, Any]]  # (tx, loss, params, *batch), keywords of `check`

# No loop that trains by a gradient at a sample: pages of checks, checkpoints, files and pieces.
NOT_TRAINED = {
    "From PyTorch and back",
    "numpyro's SVI",
    "Checkpoints with orbax",
    "Checkpoints with flax msgpack",
    "Saving a posterior",
    "A family of your own",
}


def until_training(code: str, loop: int = 0) -> Names:
    """Run a recipe up to its loop over range(...), of which the number of steps is kept.

    A loop around that one, over tasks, is entered with its first item.
    """
    names: Names = {"__name__": "page"}

    def run(body: list[ast.stmt]) -> Names:
        exec(compile(ast.Module(body, []), "recipe", "exec"), names)
        return names

    def until(body: list[ast.stmt], loop: int) -> Names:
        for statement in body:
            defines = isinstance(statement, ast.FunctionDef | ast.ClassDef)
            inside = [] if defines else list(ast.walk(statement))
            loops = [x.iter for x in inside if isinstance(x, ast.For | ast.comprehension)]
            counts = [x for x in loops if ast.unparse(x).startswith("range(")]
            if counts and not loop:
                if isinstance(statement, ast.For) and statement.iter not in counts:
                    target, items = map(ast.unparse, (statement.target, statement.iter))
                    run(ast.parse(f"{target} = next(iter({items}))").body)
                    return until(statement.body, 0)
                return names | {"steps": len(eval(ast.unparse(counts[0]), names))}
            loop -= bool(counts)
            run([statement])
        raise AssertionError("no loop over range(...)")

    return until(ast.parse(code).body, loop)


def plain(n: Names, *batch: Any, **more: Any) -> Case:
    own_step = {"step": n["step"]} if "step" in n else {}
    return (n["tx"], n["loss"], n["params"], *batch), {
        "num_examples": len(n["x"])
    } | own_step | more


def whole(n: Names, **more: Any) -> Case:
    return plain(n, n["x"], n["y"], **more)


def linen(n: Names, loss: Any, *batch: Any, **more: Any) -> Case:
    return (n["state"].tx, loss, n["state"].params, *batch), more


def of_model(n: Names, loss: Callable[[Any, Any], Any]) -> Case:
    """The model as a function of its weights is what `blr.nnx.posterior` returns."""
    q, apply = blr.nnx.posterior(n["model"], n["optimizer"])
    batch = n["x"][:128], n["y"][:128]
    on_weights = lambda theta, x, y: loss(apply(theta, x), y)  # noqa: E731
    return (n["tx"], on_weights, q.mean, *batch), {"num_examples": len(n["x"])}


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def valid_mean(n: Names) -> Callable[..., Any]:
    return lambda p, t, y, w: jnp.sum(n["values"](p, t, y) * w) / jnp.sum(w)


SET_UPS: dict[str, Callable[[Names], Case]] = {
    "README.md": whole,
    "Raw JAX": lambda n: plain(n, n["x"][:100], n["y"][:100], step=n["train_step"]),
    "Nothing to search: an optimizer from two counts": lambda n: (
        (n["recipe"].optimizer, n["loss"], n["params"], n["train_x"][:50], n["train_y"][:50]),
        {"num_examples": len(n["train_x"]), "step": n["step"]},
    ),
    "Linen TrainState": lambda n: linen(
        n, n["loss"], n["x"][:128], n["y"][:128], num_examples=len(n["x"])
    ),
    "Linen with BatchNorm, dropout and several samples": lambda n: linen(
        n, lambda p, *batch: n["loss"](p, n["state"], *batch),
        n["x"][:128], n["y"][:128], jax.random.key(0), num_examples=len(n["x"]), has_aux=True,
    ),
    "Transfer: a frozen backbone, and no decay on biases and norms": lambda n: linen(
        n, lambda p, *batch: n["loss"](p, n["state"], *batch), n["train_x"], n["train_y"],
        num_examples=len(n["train_x"]),
    ),
    "A convnet in nnx: the loop changes in one line": lambda n: of_model(n, cross_entropy),
    "nnx with several samples and dropout": lambda n: of_model(
        n, lambda found, y: jnp.mean((found - y) ** 2)
    ),
    "VOGN: squares of the gradients of single examples": lambda n: plain(
        n, n["x"][:100], n["y"][:100], step=n["train_step"]
    ),
    "Gradient accumulation with optax.MultiSteps": lambda n: plain(n, n["x"][:32], n["y"][:32]),
    "Which examples stand out": whole,
    "LoRA: what ess means for tokens": lambda n: plain(
        n | {"x": range(n["tokens"])}, n["text"]
    ),
    "A posterior over a part of the model with optax.partition": whole,
    "Diagnostics of a training step": whole,
    "Regression with noise that depends on the input": whole,
    "An ensemble by vmap": lambda n: whole(
        {k: n[k] for k in ("tx", "loss", "x", "y")}
        | {"params": jax.tree.map(lambda leaf: leaf[0], n["params"])}
    ),
    "One task after another: a posterior as the prior": lambda n: plain(
        n | {"x": n["task_x"]}, n["task_x"], n["task_y"]
    ),
    "Cold posteriors and temperature scaling": lambda n: plain(
        n | {"x": n["train_x"]}, n["train_x"], n["train_y"]
    ),
    "Sequences with padding": lambda n: (
        (n["tx"], valid_mean(n), n["params"], n["tokens"], n["labels"], n["valid"]),
        {"num_examples": int(n["valid"].sum())},
    ),
}  # fmt: skip
LOOPS = {"Transfer: a frozen backbone, and no decay on biases and norms": 1}  # after pretraining


def case(name: str, edit: Callable[[str], str] = lambda code: code) -> Case:
    ((_, code),) = programs()[name][1]
    names = until_training(edit(code), LOOPS.get(name, 0))
    arguments, more = SET_UPS[name](names)
    return arguments, {"num_steps": names["steps"], **more}


def test_every_recipe_that_trains_is_checked():
    recipes = {name for name in FACTS if not name.startswith("docs/")}
    assert recipes == set(SET_UPS) | NOT_TRAINED


@pytest.mark.parametrize("name", SET_UPS)
def test_check_is_silent_on_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "REGISTRY", {**registry.REGISTRY})
    arguments, more = case(name)
    report = blr.check(*arguments, **more)
    assert report.ok, str(report)
    assert report.numbers["ess"] == pytest.approx(more["num_examples"], rel=1e-6)


def line(pattern: str, instead: str) -> Callable[[str], str]:
    """An edit of the recipe, which must change something."""

    def edit(code: str) -> str:
        edited = re.sub(pattern, instead, code)
        assert edited != code
        return edited

    return edit


def summed(arguments: tuple) -> tuple:
    tx, loss, params, *batch = arguments
    return tx, lambda p, *b: loss(p, *b) * len(b[0]), params, *batch


def behind(member: Any) -> Callable[[tuple], tuple]:
    return lambda arguments: (optax.chain(member, arguments[0]), *arguments[1:])


AT_SAMPLE = r"theta = blr.sample\(opt_state, params\)"
MISTAKES: dict[str, tuple[str, Any, Any]] = {
    "gradient_at_params": ("Raw JAX", line(AT_SAMPLE, "theta = params"), None),
    "sample_as_params": (
        "Raw JAX", line(r"(grads, opt_state, |apply_updates\()params", r"\1theta"), None,
    ),
    "sum_loss": ("A convnet in nnx: the loop changes in one line", None, summed),
    "ess_is_batch_size": ("Linen TrainState", line(r"ess=len\(x\)", "ess=128"), None),
    "ess_is_one": ("An ensemble by vmap", line(r"ess=len\(x\)", "ess=1"), None),
    "slow_b2": (
        "Transfer: a frozen backbone, and no decay on biases and norms",
        line(r"b2=0.99,", "b2=0.99999,"), None,
    ),
    "transformed_gradient": (
        "Linen with BatchNorm, dropout and several samples",
        None, behind(optax.clip_by_global_norm(1.0)),
    ),
    "averaged_gradient": ("Sequences with padding", None, behind(optax.ema(0.9))),
    "wide_first_noise": (
        "LoRA: what ess means for tokens", line("hess_init=0.1", "hess_init=1e-6"), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_names_the_mistake_in_a_recipe(mistake: str):
    name, edit, around = MISTAKES[mistake]
    arguments, more = case(name, edit or (lambda code: code))
    report = blr.check(*(around(arguments) if around else arguments), **more)
    assert mistake in [one.name for one in report.warnings], str(report)
