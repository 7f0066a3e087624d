"""Standard parameters that lambda cannot hold are refused; all others come back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_tools import program
from tools import close

import blr_optax as blr
from blr_optax import families

EXTREME = [1e-30, 1e-12, 1e-7, 1e-4, 0.3, 1.0, 20.0, 1e3, 1e7, 1e18, 1e30]
FEW = [1e-25, 1e-8, 1e-3, 1.0, 50.0, 1e6, 1e25]
PLACES = [0.0, 1e-20, -1.0, 300.0, 1e6, 1e20]
PROBABILITIES = [1e-30, 1e-7, 0.5, 1 - 1e-6]
EYE = np.eye(2)
MATRICES = [s * EYE for s in (1e-30, 1e-8, 1.0, 1e8, 1e30)]
MATRICES += [np.array([[1.0, c], [c, 1.0]]) for c in (0.9, 0.9999, 1 - 1e-6)]
MATRICES += [np.diag([1e-6, 1e6]), np.diag([1e-18, 1e18])]
SIDES = [np.array([x, 1.0]) for x in PLACES]
# Every registered family of standard parameters, each with values of every size.
GRID = {
    "normal": {"mean": PLACES, "variance": EXTREME},
    "gaussian": {"mean": SIDES, "covariance": MATRICES},
    "gaussian_fixed": {"mean": SIDES, "precision": MATRICES},
    "gaussian_diagonal": {"mean": PLACES, "precision": EXTREME},
    "log_normal": {"location": PLACES, "precision": EXTREME},
    "laplace": {"scale": EXTREME, "location": PLACES},
    "exponential": {"rate": EXTREME},
    "gamma": {"concentration": EXTREME, "rate": FEW},
    "inverse_gamma": {"concentration": EXTREME, "scale": FEW},
    "inverse_gaussian": {"mean": EXTREME, "shape": FEW},
    "weibull": {"scale": [*EXTREME, 500.0, 5000.0], "shape": [*FEW, 10.0, 15.0]},
    "beta": {"alpha": EXTREME, "beta": FEW},
    "dirichlet": {"concentration": [np.array([a, 1.0, b]) for a in EXTREME for b in FEW]},
    "bernoulli": {"probability": PROBABILITIES},
    "rademacher": {"logit": PLACES},
    "binomial": {"probability": PROBABILITIES, "total": [0, 5, 3e9, 1e30]},
    "geometric": {"probability": PROBABILITIES},
    "negative_binomial": {"probability": PROBABILITIES, "total": EXTREME},
    "poisson": {"rate": EXTREME},
    "categorical": {"logits": [np.array([x, 0.0, 1.0]) for x in PLACES]},
    "multinomial": {
        "probabilities": [np.array([p, 1 - p]) for p in PROBABILITIES],
        "total": [0, 5, 3e9],
    },
    "von_mises_fisher": {"direction": SIDES, "concentration": [0.0, *EXTREME]},
    "wishart": {"scale": MATRICES, "degrees": [1.0 + 1e-6, 1.5, 4.0, 1e8]},
    "inverse_wishart": {"scale": MATRICES, "degrees": [1.0 + 1e-6, 1.5, 4.0, 1e8]},
    "normal_gamma": {"mean": PLACES, "kappa": FEW, "concentration": [1.0], "rate": FEW},
    "normal_inverse_gamma": {"mean": PLACES, "kappa": FEW, "concentration": FEW, "scale": [1.0]},
    "normal_wishart": {
        "mean": SIDES,
        "kappa": [1e-6, 1.0, 1e6],
        "scale": MATRICES[1:4],
        "degrees": [4.0],
    },
    "mixture": {
        "weights": [np.array([w, 1 - w]) for w in (0.5, 1e-7)],
        "mean": [np.array([[x], [1.0]]) for x in PLACES],
        "covariance": [np.array([[[s]], [[1.0]]]) for s in (1e-30, 1.0, 1e30)],
    },
    "skew_gaussian": {
        "mean": SIDES,
        "skew": [np.ones(2), 1e9 * np.ones(2)],
        "covariance": MATRICES,
    },
    "student_t": {"mean": SIDES[:3], "degrees": FEW, "scale": MATRICES},
    "gaussian_low_rank": {
        "mean": SIDES,
        "diagonal": [np.array([x, 1.0]) for x in FEW],
        "factor": [np.ones((2, 1)), 1e-9 * np.ones((2, 1))],
    },
    "matrix_gaussian": {
        "mean": [x * np.ones((2, 2)) for x in PLACES],
        "row_precision": MATRICES,
        "column_precision": [EYE],
    },
}
MATRIX = ("covariance", "scale", "precision", "row_precision", "column_precision")
FREE = ("logits", "direction", "skew", "factor")  # equal members may differ in these


def off(name, x, back, spread):
    """The relative error of a parameter, of matrices beside the diagonal, in numpy."""
    x, back = np.asarray(x, float), np.asarray(back, float)
    if name in MATRIX and x.ndim > 1:
        root = np.sqrt(np.diagonal(x, axis1=-2, axis2=-1))
        size = root[..., :, None] * root[..., None, :]
    elif name in ("mean", "location"):
        size = np.max(np.abs(x)) + spread
    else:
        size = np.abs(x)
    return np.max(np.abs(back - x) / np.where(size > 0, size, 1e-15))


def test_every_family_with_standard_parameters_is_in_the_grid():
    named = {name for name in families.names() if not name.startswith(("test_", "wide_"))}
    assert named == set(GRID)


@pytest.mark.parametrize("name", GRID)
def test_extreme_parameters_come_back_or_are_refused(name):
    """In float32: within 1e-3 and in the domain, or a ValueError that names the family."""
    family, names = families.get(name), list(GRID[name])
    kept = refused = 0
    for values in itertools.product(*GRID[name].values()):
        standard = dict(zip(names, values, strict=True))
        try:
            lam = family.natural(**standard)
        except ValueError as error:
            refused += 1
            assert ".natural" in str(error)
            sizes = np.concatenate([np.abs(np.ravel(x)) for x in values])
            assert not np.all((sizes >= 0.3) & (sizes <= 20.0)) or len(set(sizes)) > 1
            continue
        kept += 1
        back = {k: np.asarray(v) for k, v in program(family.standard)(lam).items()}
        assert bool(program(family.in_domain)(lam)), standard
        spread = np.sqrt(np.max(back.get("variance", back.get("covariance", 0.0))))
        for key, x in standard.items():
            if key in back and key not in FREE:
                assert off(key, x, back[key], spread) < 1.1e-3, (key, standard, back)
            elif key == "precision" and "variance" in back:
                close(1 / back["variance"], x, rtol=1e-3)
        assert all(np.isfinite(x).all() for x in back.values())
    assert kept and refused + kept == np.prod([len(v) for v in GRID[name].values()])


LEAST = {
    "gamma": ("concentration", {"rate": 2.0}, 3e-5),
    "inverse_gamma": ("concentration", {"scale": 2.0}, 6e-5),
    "beta": ("beta", {"alpha": 2.0}, 3e-5),
    "dirichlet": ("concentration", {}, 3e-5),
    "wishart": ("degrees", {"scale": np.eye(1)}, 6e-5),
    "inverse_wishart": ("degrees", {"scale": np.eye(1)}, 1.2e-4),
}


@pytest.mark.parametrize("name", LEAST)
def test_small_concentrations(x64, name):
    """a - 1 rounds by half the spacing of numbers below one (-a - 1: above), 3e-8 in float32."""
    family, (key, others, least) = families.get(name), LEAST[name]
    value = lambda a: np.array([a, 1.0, 2.0]) if name == "dirichlet" else a  # noqa: E731
    for dtype, scale in ((np.float32, 1.0), (np.float64, 2.0**-29)):
        given = {k: np.asarray(x, dtype) for k, x in others.items()}
        natural = lambda a, given=given, dtype=dtype: family.natural(  # noqa: E731
            **{key: np.asarray(value(a), dtype)}, **given
        )
        for a in (1.1, 10.0, 1e3):
            back = np.ravel(family.standard(natural(a * least * scale))[key])[0]
            close(back, a * least * scale, rtol=1e-3)
        for a in (0.9, 0.1, 1e-3, 1e-6):
            with pytest.raises(
                ValueError, match=rf"{key}=.*lost in {np.dtype(dtype)}.* kept from"
            ) as e:
                natural(a * least * scale)
            assert ("Use float64" in str(e.value)) == (dtype == np.float32)
            said = float(str(e.value).split("kept from about ")[1].split(". ")[0].rstrip("."))
            assert 0.95 < said / (least * scale) < 1.6


def test_the_refusal_does_not_depend_on_luck():
    """2^-20 is kept to the last digit in float32, and its first step would lose it."""
    gamma = families.get("gamma")
    with pytest.raises(ValueError, match=r"hold it as 9\.536743e-07, give or take 3e-08"):
        gamma.natural(concentration=2.0**-20, rate=1.0)
    # What eager arithmetic makes of it, 1.3 % off, in the words too.
    back = (np.float32(1e-6) - np.float32(1)) + np.float32(1)
    with pytest.raises(ValueError, match=f"hold it as {back:.7g}".replace(".", r"\.")):
        gamma.natural(concentration=1e-6, rate=1.0)


def test_weibulls_whose_power_leaves_the_numbers(x64):
    weibull = families.get("weibull")
    for scale, shape in ((500.0, 15.0), (5000.0, 11.0), (100.0, 30.0), (1e-3, 15.0)):
        with pytest.raises(ValueError, match=r"scale=.*shape=.*float32.*kept (from|up to)"):
            weibull.natural(scale=np.float32(scale), shape=np.float32(shape))
        lam = weibull.natural(scale=scale, shape=shape)  # in float64
        assert bool(weibull.in_domain(lam))
        close(weibull.standard(lam)["scale"], scale, rtol=1e-12)


def test_one_lost_member_of_a_batch_is_found_and_traced_ones_pass():
    gamma, mean_field = families.get("gamma"), families.MeanField("gamma")
    many = np.linspace(1.0, 40.0, 300).astype(np.float32).reshape(10, 30)
    lam = gamma.natural(concentration=many, rate=1e-5)
    close(gamma.standard(lam)["concentration"], many, rtol=1e-6)
    many[7, 3] = 1e-7
    with pytest.raises(ValueError, match=r"concentration=1\.e-07 \(at rate=2\.\)"):
        gamma.natural(concentration=many, rate=2.0)
    with pytest.raises(ValueError, match=r"concentration=1\.e-07"):
        mean_field.natural(concentration={"a": many}, rate=2.0)
    assert jax.jit(lambda a: gamma.natural(concentration=a, rate=2.0))(many).log[7, 3] < 0
    # A constant inside a trace has a value.
    with pytest.raises(ValueError, match="lost in float32"):
        jax.jit(lambda x: x + gamma.natural(concentration=1e-7, rate=2.0).log)(jnp.zeros(()))


def test_a_vague_prior_is_refused_by_name():
    with pytest.raises(ValueError, match=r"inverse_gamma\.natural: concentration=.*Use float64"):
        blr.distribution("inverse_gamma", concentration=1e-8, scale=1e-8)


@pytest.mark.parametrize(
    "name, mu",
    [
        # E[log x] = log(a / b) - 1 / a, of concentrations that a - 1 cannot tell from 0.
        ("gamma", {"log": [-1e9, -1.6], "linear": [1.0, 1.0]}),
        ("inverse_gamma", {"log": [1e9, 1.6], "reciprocal": [1.0, 1.0]}),
        ("beta", {"log": [-1e9, -1.5], "log1m": [-1e-9, -0.5]}),
        ("dirichlet", {"log": [[-1e9, -1e9, -0.7], [-1.5, -1.5, -1.5]]}),
        ("exponential", {"linear": [1e-39, 2.0]}),
        ("weibull", {"power": [1e-39, 2.0], "shape": [2.0, 2.0]}),
        ("laplace", {"deviation": [1e-39, 2.0], "location": [0.0, 0.0]}),
        ("inverse_gaussian", {"linear": [1e25, 2.0], "reciprocal": [2e-25, 1.0]}),
    ],
)
def test_the_way_back_from_mu_returns_no_strangers(name, mu):
    """In float32: NaN and False where lambda holds no member, the other row untouched."""
    family = families.get(name)
    given = family.Expectation(**{k: np.array(v, np.float32) for k, v in mu.items()})
    lam, found = jax.jit(lambda mu: family.natural_from_expectation(mu, with_status=True))(given)
    alone = jax.jit(family.natural_from_expectation)(given)
    assert list(found) == [False, True]
    assert list(jax.jit(family.in_domain)(lam)) == [False, True]
    for field in family.domains:
        assert np.isnan(getattr(lam, field)[0]).all() and np.isfinite(getattr(lam, field)[1]).all()
        np.testing.assert_array_equal(getattr(alone, field), getattr(lam, field))
