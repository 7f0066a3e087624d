"""Wrong calls of every registered family get one clear error: family, argument, value, fix.

`STARTS` says how each family is called rightly; the tests spoil one thing at a time.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr
from blr_optax import families

EYE, EYES = np.eye(2), np.stack([np.eye(2)] * 3)
MEAN_AND_EYE = {"mean": [0, 1], "covariance": EYE}
STARTS = {
    "bernoulli": {"probability": 0.25},
    "beta": {"alpha": 2, "beta": 3},
    "binomial": {"probability": 0.25, "total": 4},
    "categorical": {"probabilities": [0.5, 0.25, 0.25]},
    "dirichlet": {"concentration": [1, 2, 3]},
    "exponential": {"rate": 2},
    "gamma": {"concentration": 2, "rate": 1},
    "gaussian": MEAN_AND_EYE,
    "gaussian_diagonal": {"mean": 0, "variance": 4},
    "gaussian_fixed": MEAN_AND_EYE,
    "gaussian_low_rank": {"mean": [0, 1], "diagonal": [1, 2], "factor": [[1], [0]]},
    "geometric": {"probability": 0.25},
    "inverse_gamma": {"concentration": 3, "scale": 1},
    "inverse_gaussian": {"mean": 1, "shape": 2},
    "inverse_wishart": {"scale": EYE, "degrees": 4},
    "laplace": {"scale": 2, "location": 0},
    "log_normal": {"location": 0, "variance": 2},
    "matrix_gaussian": {
        "mean": np.zeros((2, 3)),
        "row_precision": EYE,
        "column_precision": np.eye(3),
    },
    "mixture": {"weights": [0.25, 0.25, 0.5], "mean": np.zeros((3, 2)), "covariance": EYES},
    "multinomial": {"probabilities": [0.5, 0.25, 0.25], "total": 4},
    "negative_binomial": {"probability": 0.25, "total": 2},
    "normal": {"mean": 0, "variance": 4},
    "normal_gamma": {"mean": 0, "kappa": 1, "concentration": 2, "rate": 1},
    "normal_inverse_gamma": {"mean": 0, "kappa": 1, "concentration": 2, "scale": 1},
    "normal_wishart": {"mean": [0, 1], "kappa": 1, "scale": EYE, "degrees": 4},
    "poisson": {"rate": 2},
    "rademacher": {"probability": 0.25},
    "skew_gaussian": {**MEAN_AND_EYE, "skew": [1, 2]},
    "student_t": {"mean": [0, 1], "degrees": 5, "scale": EYE},
    "von_mises_fisher": {"direction": [0, 1, 0], "concentration": 2},
    "weibull": {"scale": 1, "shape": 2},
    "wishart": {"scale": EYE, "degrees": 4},
}
# The alternatives: what may stand in place of what `STARTS` gives.
OTHER = {
    "covariance": "precision",
    "logit": "probability",
    "logits": "probabilities",
    "probabilities": "logits",
    "probability": "logit",
    "scale": "covariance",
    "variance": "precision",
}
# One value outside the range of every parameter, whatever the family.
OUTSIDE = np.nan
every_family = pytest.mark.parametrize("name", STARTS)


def says(call, *words):
    """The call raises a ValueError with all these words."""
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def setup(name):
    """The family, its right call, and its name in errors."""
    who = "normal" if name == "gaussian_diagonal" else name
    return families.get(name), STARTS[name], who


def alternatives(family):
    """The keywords of which one is given."""
    inner = getattr(family, "family", family) if isinstance(family, families.MeanField) else family
    given = inspect.signature(inner.natural).parameters.values()
    return [p.name for p in given if p.default is None]


def test_every_registered_family_is_tried():
    assert set(STARTS) == {n for n in families.names() if not n.startswith(("test_", "wide_"))}


@every_family
def test_lists_integers_and_half_precision_become_float32(name):
    family, start, _ = setup(name)
    lam = family.natural(**start)
    for dtype in (jnp.float32, jnp.bfloat16):  # which holds all of these numbers
        arrays = {key: jnp.asarray(value, dtype) for key, value in start.items()}
        jax.tree.map(np.testing.assert_array_equal, lam, family.natural(**arrays))
    for leaf in jax.tree.leaves(lam):
        assert leaf.dtype == jnp.float32 and not leaf.weak_type
    assert bool(jnp.all(family.in_domain(lam)))


@every_family
def test_keywords(name):
    family, start, who = setup(name)
    takes = [key for key in start if key not in alternatives(family)] + alternatives(family)
    says(lambda: family.natural(**start, sigma=1.0), who, "unknown keyword 'sigma'", *takes)
    for key in start:
        others = {k: v for k, v in start.items() if k != key}
        missing = "give exactly one of" if key in alternatives(family) else f"{key} is missing"
        says(lambda others=others: family.natural(**others), who, missing)
        says(lambda others=others, key=key: family.natural(**{**others, key: None}), who, missing)
    if name != "gaussian_diagonal":  # whose keywords are what another family takes
        says(lambda: family.natural(*start.values()), who, "give keywords", *start)


@pytest.mark.parametrize("name", [n for n in STARTS if alternatives(families.get(n))])
def test_two_alternatives(name):
    family, start, who = setup(name)
    (first,) = set(start) & set(alternatives(family))
    both = {**start, OTHER[first]: start[first]}
    says(lambda: family.natural(**both), who, "exactly one of", f"{first}", OTHER[first])


@every_family
@pytest.mark.parametrize(
    "wrong",
    ["two", True, 1j, object(), [[1.0], [2.0, 3.0]], jax.random.key(0)],
    ids=["text", "bool", "complex", "object", "ragged", "key"],  # the same in every process
)
def test_values_that_are_no_numbers(name, wrong):
    family, start, who = setup(name)
    if isinstance(wrong, list) and name == "gaussian_diagonal":
        wrong = {"a": "two"}  # a list is a tree to it
    for key in start:
        words = (who, key, "must be a number or an array of numbers; got ")
        says(lambda key=key: family.natural(**{**start, key: wrong}), *words)


@every_family
def test_shapes(name):
    family, start, who = setup(name)
    ranks = {key: np.ndim(value) for key, value in start.items()}
    for key, value in start.items():
        x = np.asarray(value, float)
        if not ranks[key]:
            continue
        words = (who, f"{key} must have shape [..., ", f"got shape {x.shape[1:]}")
        says(lambda key=key, x=x: family.natural(**{**start, key: x[0]}), *words)
        if key in ("scale", "covariance") and name != "mixture":
            words = (who, f"{key} must have shape [..., d, d]", "got shape (2, 3)")
            says(lambda key=key: family.natural(**{**start, key: np.ones((2, 3))}), *words)
        if key != "factor" and sum(rank > 0 for rank in ranks.values()) > 1:
            longer = np.concatenate([x, x], axis=-1)
            says(lambda key=key, x=longer: family.natural(**{**start, key: x}), who, "must have")
    if len(start) > 1:
        batches = {
            key: np.broadcast_to(value, (2 + i, *np.shape(value)))
            for i, (key, value) in enumerate(start.items())
        }
        says(lambda: family.natural(**batches), who, "batch shapes do not broadcast", *start)


@every_family
def test_values_outside_the_range_are_named_in_eager_mode_and_pass_traced(name):
    family, start, who = setup(name)
    for key, value in start.items():
        wrong = np.full(np.shape(value), OUTSIDE)
        spoilt = {**start, key: wrong}
        says(lambda spoilt=spoilt: family.natural(**spoilt), who, f"{key} must be ", "got ")

        def traced(x, key=key):
            return family.natural(**{**start, key: x})

        jax.eval_shape(traced, jnp.asarray(wrong))
        with pytest.raises(ValueError, match=f"{key} must be "):  # constants inside a trace
            jax.eval_shape(lambda _, spoilt=spoilt: family.natural(**spoilt), 0.0)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("normal", {"variance": -1.0}, ["variance must be positive", "-1.0"]),
        ("bernoulli", {"probability": 1}, ["strictly between 0 and 1", "1.0"]),
        ("binomial", {"total": 2.5}, ["total must be a whole number of at least zero", "2.5"]),
        ("categorical", {"probabilities": [0.5, 0.6]}, ["positive and sum to 1", "0.6"]),
        ("categorical", {"probabilities": [1.0]}, ["[..., K] with K >= 2", "(1,)"]),
        ("dirichlet", {"concentration": 1.0}, ["[..., K] with K >= 2", "()"]),
        ("von_mises_fisher", {"direction": [0, 0]}, ["direction must be finite and not zero"]),
        ("von_mises_fisher", {"direction": [1]}, ["[..., d] with d >= 2", "(1,)"]),
        ("von_mises_fisher", {"concentration": -1}, ["non-negative", "-1.0"]),
        ("gaussian", {"mean": 0.0}, ["mean must have shape [..., d]", "()"]),
        ("gaussian", {"covariance": np.eye(3)}, ["d = 2 as in mean", "(3, 3)"]),
        ("gaussian", {"covariance": [[1, 0.5], [0, 1]]}, ["symmetric positive definite"]),
        ("wishart", {"degrees": 1}, ["degrees must be above d - 1 = 1", "1.0"]),
        ("inverse_wishart", {"degrees": 1}, ["degrees must be above d - 1 = 1", "1.0"]),
        ("normal_wishart", {"degrees": 1}, ["degrees must be above d - 1 = 1", "1.0"]),
        ("mixture", {"weights": [0.5, 0.5]}, ["K = 2 as in weights", "(3, 2)"]),
        ("normal", {"mean": {"w": 0.0}}, ["families.MeanField(family)"]),
    ],
)
def test_ranges_and_sizes(name, change, words):
    family, start, who = setup(name)
    says(lambda: family.natural(**{**start, **change}), who, *words)


@every_family
def test_the_docstring_says_what_the_fields_are(name):
    family = families.get(name)
    if isinstance(family, families.MeanField):
        family = family.family
    text = " ".join(family.__doc__.split())
    assert text.count(" lambda: ") == 1
    lam, mu = text.split(" lambda: ")[1].split("Example:")[0], "There is no mu"
    if isinstance(family, families.ExponentialFamily):
        lam, mu = lam.split(" mu: ")
    for field in family.Natural._fields:
        assert all(field in part for part in (lam, *([mu] if " = " in mu else []))), field
    assert mu in lam or " = " in mu


def test_counts_beyond_32_bits_are_numbers():
    lam = families.get("binomial").natural(probability=0.5, total=10**10)
    assert float(lam.total) == 1e10


def test_one_precision_and_one_batch_shape():
    lam = families.get("normal").natural(mean=jnp.zeros(3, jnp.bfloat16), precision=4)
    assert lam.linear.dtype == lam.quadratic.dtype == jnp.float32
    lam = families.get("wishart").natural(scale=EYE, degrees=[3.0, 4.0])
    assert lam.matrix.shape == (2, 2, 2)


# --- families of families -------------------------------------------------------------------------


def test_mixtures_say_which_components_have_what():
    start = {"weights": [0.5, 0.5], "mean": np.zeros((2, 1))}
    full, diagonal = families.get("mixture"), families.get("mixture", family="normal")
    assert diagonal == families.get("mixture", family=families.get("normal"))
    spread = np.ones((2, 1))
    hint = "get('mixture', family='normal')"
    says(lambda: full.natural(**start, variance=spread), "mixture", "give covariance", hint)
    says(lambda: diagonal.natural(**start, covariance=spread), "mixture", "give variance")
    assert diagonal.natural(**start, variance=spread).log_odds.shape == (1,)
    says(lambda: families.get("mixture", family="gamma"), "must be Gaussian")


def test_lifts_and_products_take_names():
    assert families.MeanField("normal") == families.get("gaussian_diagonal")
    by_name = families.Product({"a": "normal", "b": "gamma"})
    assert by_name == families.Product({"a": families.get("normal"), "b": families.get("gamma")})
    says(lambda: families.MeanField("gausian"), "unknown family 'gausian'; known: ")
    for name in ("gaussian", "mixture"):
        says(lambda name=name: families.MeanField(name), "is not elementwise", "Product")
    for wrong in ({}, ["normal"], {"a": "mixture"}):
        says(lambda wrong=wrong: families.Product(wrong), "give a dict of exponential families")
    says(lambda: families.Product({"a": 1.0}), "unknown family 1.0")


def test_lifts_and_products_say_where():
    tree = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    lift = families.MeanField("normal")
    says(lambda: lift.natural(mean=tree, precision={"w": 1.0, "b": -2.0}), "leaf ['b']", "-2.0")
    spread_first = lift.natural(precision=4.0, mean=tree)
    assert spread_first.quadratic["w"].shape == (2,)
    product = families.Product({"a": "normal", "b": "gamma"})
    good = {"mean": 0, "variance": 1}
    says(lambda: product.natural(a=good, b={"rate": 1}), "factor 'b'", "concentration is missing")
    says(lambda: product.natural(a=good), "the factors are ['a', 'b']", "got ['a']")


def test_the_registry_says_what_a_family_takes():
    says(lambda: families.get("mixture", k=3), "'mixture'", "'k'", "it takes family")
    says(lambda: families.get("normal", mean=0.0), "it takes none", ".natural(mean=...)")
    says(lambda: families.get(families.Gamma), "Gamma is a class", "Gamma()")
    for wrong in (3.0, ["normal"], None):
        says(lambda wrong=wrong: families.get(wrong), "unknown family", "known: ")
    says(lambda: blr.blr_update("gama", jnp.sum, 0.1), "unknown family 'gama'")


class TestFamiliesOfOnesOwn:
    """What the lifts check of a family whose `natural` is plain."""

    class Plain(families.Normal):
        def natural(self, *, centre, width=1.0):
            return super().natural(mean=centre, variance=width**2)

    class Open(families.Normal):
        def natural(self, **standard):
            return super().natural(**standard)

    def test_keywords_with_defaults_may_be_left_out(self):
        lift = families.MeanField(self.Plain())
        assert lift.natural(centre={"w": jnp.zeros(2)}).linear["w"].shape == (2,)
        says(lambda: lift.natural(center=0.0), "unknown keyword 'center'; it takes centre")

    def test_any_keywords_pass(self):
        lift = families.MeanField(self.Open())
        assert lift.natural(mean=jnp.zeros(2), variance=1.0).linear.shape == (2,)
        says(lambda: lift.natural(mean=jnp.zeros(2), width=1.0), "open.natural", "'width'")


# --- what takes a family --------------------------------------------------------------------------


def test_a_prior_of_one_number_holds_for_a_whole_tree():
    tree = {"w": jnp.full(3, 2.0), "b": jnp.full(2, 2.0)}
    gamma, lift = families.get("gamma"), families.MeanField("gamma")
    one = {"concentration": 2.0, "rate": 1.0}
    scalar = blr.Distribution(gamma, gamma.natural(**one))
    full = blr.Distribution(
        lift,
        lift.natural(**{k: jax.tree.map(lambda x, v=v: 0 * x + v, tree) for k, v in one.items()}),
    )
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"])  # noqa: E731
    states = []
    for prior in (scalar, full):
        tx = blr.blr_update("gamma", loss, 0.1, prior=prior)
        update = jax.jit(tx.update)
        updates, state = update(None, tx.init(tree), tree)
        states.append((updates, state.natural))
        new = blr.natural_step(lift, full.natural, lift.combine((0.5, full.natural)), 0.1, prior)
        states[-1] += (new,)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_prior_that_does_not_fit_init_is_refused_at_once():
    gamma = families.get("gamma")
    prior, init = (
        blr.Distribution(gamma, gamma.natural(concentration=jnp.ones(k), rate=1.0)) for k in (2, 3)
    )
    tx = blr.blr_update("gamma", jnp.sum, 0.1, prior=prior, init=init)
    says(lambda: tx.init(jnp.ones(3)), "prior", "structure and shapes", "(2,)", "(3,)")


@pytest.mark.parametrize(
    "name", [n for n in STARTS if isinstance(families.get(n), families.ExponentialFamily)]
)
def test_hints_name_estimators_that_the_family_takes(name):
    family, refused = families.get(name), 0
    ways = {
        "closed_form()": blr.estimators.closed_form(),
        "pathwise(...)": blr.estimators.pathwise(10),
        "score_function(...)": blr.estimators.score_function(),
        "least_squares(...)": blr.estimators.least_squares(),
        "enumeration()": blr.estimators.enumeration(4),
        "concrete(...)": blr.estimators.concrete(),
    }
    for estimator in (blr.estimators.monte_carlo(3), *ways.values()):
        try:
            estimator.check(family)
        except ValueError as error:
            refused += 1
            hinted = [way for way in ways if way in str(error).split(";")[1]]
            assert len(hinted) >= 2 or "no relaxation" in str(error)
            for way in hinted:
                ways[way].check(family)
    assert refused
