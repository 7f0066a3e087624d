"""Parts of a posterior by path: the marginal over those weights, without what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import blr_optax as blr
from blr_optax import families

MEAN = {
    "body": np.arange(3.0, dtype=np.float32),
    "head": {"b": np.float32(7.0), "w": np.array([[4.0, 5.0]], np.float32)},
}
VARIANCE = jax.tree.map(lambda x: 1.0 / (1.0 + x), MEAN)
COVARIANCE = np.cov(np.random.default_rng(0).normal(size=(6, 20))).astype(np.float32)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_a_mean_field_has_the_leaves_below_the_path():
    q = blr.distribution("normal", mean=MEAN, variance=VARIANCE)
    head = q.part("head")
    close(head.mean, MEAN["head"])
    close(head.variance, VARIANCE["head"])
    assert isinstance(head.family, families.MeanField)
    close((head * head).mean, MEAN["head"])  # a value like any other
    assert q.part("head", "w").sample(0).shape == (1, 2)
    close(q.part("body").mean, MEAN["body"])


def test_a_frozen_rest_is_left_out():
    """One group is learnt, the other held: the posterior of the learnt group alone."""
    tx = optax.partition(
        {"learnt": blr.ivon(0.1, ess=10.0, hess_init=3.0), "frozen": optax.set_to_zero()},
        {"body": "frozen", "head": "learnt"},
    )
    params = jax.tree.map(jnp.asarray, MEAN)
    q = blr.posterior(tx.init(params), params)
    assert isinstance(q.family, families.SideBySide)
    head = q.part("head")
    assert isinstance(head.family, families.MeanField)
    assert not isinstance(head.family.family, families.Point)
    close(
        head.variance,
        jax.tree.map(lambda x: np.full_like(x, q.variance["head"]["b"]), MEAN["head"]),
    )
    assert isinstance(q.part("body").family.family, families.Point)
    with pytest.raises(ValueError, match=r"nothing at 'tail'.*body"):
        q.part("tail")


def test_a_full_gaussian_has_the_block_of_its_covariance():
    raveled = families.Raveled.like(families.get("gaussian"), MEAN)
    q = blr.Distribution(raveled, raveled.natural(mean=MEAN, covariance=COVARIANCE))
    head = q.part("head")
    close(head.mean, MEAN["head"])
    close(head.standard()["covariance"], COVARIANCE[3:, 3:])
    close(q.part("head", "w").standard()["covariance"], COVARIANCE[4:, 4:])
    mixture = families.get("mixture")
    raveled = families.Raveled.like(mixture, MEAN)
    means = np.stack([np.arange(6.0), -np.arange(6.0)])
    q = blr.Distribution(
        raveled,
        raveled.natural(
            weights=np.array([0.25, 0.75]), mean=means, covariance=np.stack([COVARIANCE] * 2)
        ),
    )
    standard = q.part("body").standard()
    close(standard["mean"], means[:, :3])
    close(standard["weights"], np.array([0.25, 0.75]))
    close(standard["covariance"], np.stack([COVARIANCE[:3, :3]] * 2))


def test_factors_leaves_of_matrices_and_other_containers():
    product = families.Product({"m": families.MeanField("normal"), "tau": "gamma"})
    q = blr.distribution(
        product,
        m={"mean": MEAN, "variance": 1.0},
        tau={"concentration": 2.0, "rate": 4.0},
    )
    close(q.part("tau").mean, 0.5)
    close(q.part("m", "head").mean, MEAN["head"])
    leafwise = families.Leafwise.like(families.get("matrix_gaussian"), MEAN)
    q = blr.Distribution(leafwise, leafwise.natural_at(MEAN))
    close(q.part("head").mean, MEAN["head"])

    @struct.dataclass
    class Model:
        layers: list

    q = blr.distribution("normal", mean=Model([np.zeros(2), np.ones(3)]), precision=1.0)
    close(q.part("layers", 1).mean, np.ones(3))
    with pytest.raises(ValueError, match=r"nothing at 2 below layers; there are \[0, 1\]"):
        q.part("layers", 2)


def test_what_has_no_parts_says_so():
    vector = blr.distribution("gaussian", mean=np.zeros(2), precision=np.eye(2))
    with pytest.raises(ValueError, match=r"Gaussian has no parts by path"):
        vector.part("head")
    with pytest.raises(ValueError, match=r"give a path"):
        vector.part()
    raveled = families.Raveled.like(families.get("skew_gaussian"), MEAN)
    skewed = blr.Distribution(
        raveled, raveled.natural(mean=np.zeros(6), skew=np.ones(6), covariance=np.eye(6))
    )
    with pytest.raises(ValueError, match=r"no parts by path"):
        skewed.part("head")
