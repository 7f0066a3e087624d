"""What `per_example` refuses, which way it takes for each parameter, and what `explain` says."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from per_example_networks import ROWS, xent

import blr_optax as blr
from blr_optax.per_example._taps._coupling import coupling
from blr_optax.per_example._taps._sums import traced

B = 6
X, Y = jnp.ones((B, 5)), jnp.arange(B) % 3
P = {"w": jnp.ones((5, 3)), "b": jnp.ones(3), "s": jnp.ones(5)}


def out(p, x):
    return x @ p["w"] + p["b"]


def one(p, x):
    return out(p, x)[:, 0]


# --- losses whose examples are coupled ------------------------------------------------------------


def batch_norm(p, x, y):
    return xent((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) @ p["w"], y)


def mixup(p, x, y):
    other = jax.random.permutation(jax.random.key(0), len(x))
    return xent(out(p, (x + x[other]) / 2), y)


def contrastive(p, x, y):
    z = out(p, x)
    return xent(z @ z.T, jnp.arange(len(x)))


def masked_mean(p, x, y):
    return jnp.sum(one(p, x) * (y > 0)) / jnp.sum(y > 0)


COUPLED = {
    "batch norm": batch_norm,
    "stopped batch norm": lambda p, x, y: jnp.mean(one(p, x) - jax.lax.stop_gradient(x).mean()),
    "mixup by permutation": mixup,
    "mixup by reversal": lambda p, x, y: xent(out(p, x + x[::-1]), y),
    "mixup by rolling": lambda p, x, y: xent(out(p, x + jnp.roll(x, 1, 0)), y),
    "mixup by indices": lambda p, x, y: jnp.mean(one(p, x[(jnp.arange(len(x)) + 1) % len(x)])),
    "shifted": lambda p, x, y: jnp.mean(one(p, x[jnp.arange(len(x)) - 1])),
    "contrastive": contrastive,
    "nt-xent": lambda p, x, y: optax.ntxent(out(p, x), y),
    "pairs": lambda p, x, y: jnp.mean((one(p, x)[:, None] - one(p, x)[None]) ** 2),
    "outer": lambda p, x, y: jnp.mean(jnp.outer(one(p, x), one(p, x))),
    "masked mean": masked_mean,
    "root of the mean": lambda p, x, y: jnp.sqrt(jnp.mean(one(p, x) ** 2)),
    "exp of the mean": lambda p, x, y: jnp.exp(jnp.mean(one(p, x))),
    "product of means": lambda p, x, y: jnp.mean(one(p, x)) * jnp.mean(x),
    "norm of the batch": lambda p, x, y: xent(out(p, x) / jnp.linalg.norm(x), y),
    "determinant": lambda p, x, y: jnp.linalg.slogdet(out(p, x).T @ out(p, x) / len(x))[1],
    "largest": lambda p, x, y: jnp.max(one(p, x)),
    "first": lambda p, x, y: one(p, x)[0],
    "top": lambda p, x, y: jax.lax.top_k(one(p, x), 1)[0].mean(),
    "neighbours": lambda p, x, y: jnp.mean((one(p, x)[1:] - one(p, x)[:-1]) ** 2),
    "cumulative": lambda p, x, y: jnp.mean(jnp.cumsum(one(p, x))),
    "sorted": lambda p, x, y: jnp.mean(jnp.sort(one(p, x)) * x[:, 0]),
    "softmax over examples": lambda p, x, y: xent(jax.nn.softmax(out(p, x), 0), y),
    "spectrum": lambda p, x, y: jnp.mean(jnp.abs(jnp.fft.fft(one(p, x)))),
    "whitened": lambda p, x, y: jnp.mean(jnp.linalg.qr(x)[0]) * p["b"][0],
    "smoothed": lambda p, x, y: jnp.mean(jnp.convolve(one(p, x), jnp.ones(3), "same")),
    "gathered": lambda p, x, y: jnp.mean(one(p, x)[y]),
    "by position": lambda p, x, y: jnp.mean(one(p, x) * jnp.arange(len(x))),
    "first half": lambda p, x, y: jnp.mean(
        jnp.where(jnp.arange(len(x)) < len(x) // 2, one(p, x), 0)
    ),
}


@pytest.mark.parametrize("loss", COUPLED.values(), ids=COUPLED.keys())
def test_coupled_examples_are_refused(loss):
    for ask in (blr.per_example, blr.explain):
        with pytest.raises(ValueError, match=r"couples its examples: .*weights=") as error:
            ask(loss, P, X, Y)
    assert str(error.value).startswith("explain: ")


SUMS = {
    "sum": (lambda p, x, y: jnp.sum(one(p, x) ** 2), 1),
    "divided by four": (lambda p, x, y: jnp.sum(one(p, x) ** 2) / 4, 1),
    "mean of a mean": (lambda p, x, y: jnp.mean(one(p, x)) / len(x), -1),
}


@pytest.mark.parametrize("loss, power", SUMS.values(), ids=SUMS.keys())
def test_sums_are_refused(loss, power):
    with pytest.raises(
        ValueError, match=re.escape(f"not a mean over the batch (it grows like B^{power})")
    ):
        blr.per_example(loss, P, X, Y)


def dropout(p, x, y):
    return xent(out(p, x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)), y)


def dropout_by_example(p, x, y):
    def each(i, x):
        key = jax.random.fold_in(jax.random.key(0), i)
        return out(p, x * jax.random.bernoulli(key, 0.5, x.shape))

    return xent(jax.vmap(each)(jnp.arange(len(x)), x), y)


def attention(p, x, y):
    h = x[:, :, None, None] * p["b"]
    return jnp.mean(jax.nn.dot_product_attention(h, h, h) ** 2)


def gaussian_likelihood(p, x, y):
    covariance = jnp.eye(5) + p["w"] @ p["w"].T
    return -jnp.mean(jax.scipy.stats.multivariate_normal.logpdf(x, p["s"], covariance))


def tokens(p, x, y):
    scores = jax.nn.log_softmax((x[:, :, None] * p["b"]).reshape(-1, 3))
    return -jnp.mean(scores[jnp.arange(len(y) * 5), jnp.repeat(y, 5)])


SEPARATE = {
    "cross-entropy": lambda p, x, y: xent(out(p, x), y),
    "by indices": lambda p, x, y: -jnp.mean(jax.nn.log_softmax(out(p, x))[jnp.arange(len(y)), y]),
    "tokens by indices": tokens,
    "one-hot": lambda p, x, y: -jnp.sum(jax.nn.one_hot(y, 3) * out(p, x)) / len(y),
    "vdot": lambda p, x, y: jnp.vdot(jax.nn.one_hot(y, 3), out(p, x)) / len(y),
    "squares": lambda p, x, y: jnp.mean((out(p, x) - y[:, None]) ** 2),
    "divided first": lambda p, x, y: jnp.sum(one(p, x) / len(y)),
    "divided by an array": lambda p, x, y: jnp.sum(one(p, x)) / jnp.asarray(len(y), jnp.float32),
    "divided by counted ones": lambda p, x, y: jnp.sum(one(p, x)) / jnp.ones_like(y).sum(),
    "penalty": lambda p, x, y: xent(out(p, x), y) + 0.1 * jnp.sum(p["w"] ** 2),
    "two means": lambda p, x, y: xent(out(p, x), y) + jnp.mean(jnp.tanh(x) ** 2),
    "tasks": lambda p, x, y: jnp.dot(jnp.arange(3.0), jnp.mean(out(p, x) ** 2, 0)),
    "picked tasks": lambda p, x, y: (lambda t: t[0] + t[1] / 2)(jnp.mean(out(p, x) ** 2, 0)),
    "stacked means": lambda p, x, y: jnp.stack([one(p, x).mean(), out(p, x).mean()]).sum(),
    "flat": lambda p, x, y: jnp.mean((x.reshape(-1, 1) * p["b"]) ** 2),
    "bfloat16": lambda p, x, y: xent(out(p, x.astype(jnp.bfloat16)), y),
    "vmap": lambda p, x, y: jax.vmap(lambda x, y: -jax.nn.log_softmax(out(p, x))[y])(x, y).mean(),
    "map": lambda p, x, y: jnp.mean(jax.lax.map(lambda xy: out(p, xy[0])[xy[1]], (x, y))),
    "while": lambda p, x, y: jnp.mean(
        jax.vmap(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, jnp.exp, x))(x) @ p["w"]
    ),
    "scan over layers": lambda p, x, y: jnp.mean(
        jax.lax.scan(lambda h, s: (jnp.tanh(h * s), None), x, p["b"])[0]
    ),
    "dropout": dropout,
    "dropout by example": dropout_by_example,
    "attention": attention,
    "covariance": gaussian_likelihood,
    "pooling": lambda p, x, y: jnp.mean(
        jax.lax.reduce_window(out(p, x), -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME")
    ),
    "sorted features": lambda p, x, y: jnp.mean(jnp.sort(out(p, x), -1)[:, 0]),
    "shuffled features": lambda p, x, y: jnp.mean(
        out(p, x[:, jax.random.permutation(jax.random.key(0), 5)])
    ),
    "spectrum of features": lambda p, x, y: jnp.mean(jnp.abs(jnp.fft.fft(x * p["s"]))),
    "token weights": lambda p, x, y: jnp.mean(jnp.sum(x * p["s"] * (x > 0), 1) / jnp.sum(x > 0, 1)),
    "labels": lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(out(p, x), y).mean(),
    "sigmoid": lambda p, x, y: optax.sigmoid_binary_cross_entropy(one(p, x), 1.0 * y).mean(),
    "focal": lambda p, x, y: optax.sigmoid_focal_loss(one(p, x), 1.0 * y).mean(),
    "huber": lambda p, x, y: optax.huber_loss(one(p, x), 1.0 * y).mean(),
    "cosine": lambda p, x, y: optax.cosine_distance(out(p, x), x[:, :3], epsilon=1e-6).mean(),
    "ctc": lambda p, x, y: optax.ctc_loss(
        x[:, :, None] * p["b"], jnp.zeros((len(y), 5)), jnp.ones((len(y), 2), int),
        jnp.zeros((len(y), 2)),
    ).mean(),
}  # fmt: skip


@pytest.mark.parametrize("loss", SEPARATE.values(), ids=SEPARATE.keys())
def test_separate_examples_are_not_refused(loss):
    found = coupling(loss, P, (X, Y))
    assert found.tag == "sum" and found.power in (-1, None), found


def test_models_of_the_table_are_not_refused(x64):
    for row in ROWS.values():
        found = coupling(row.loss, row.params, row.batch)
        assert found.tag == "sum" and found.power in (-1, None), (row.name, found)


def test_a_loop_over_the_examples_warns():
    def loss(p, x):
        return jax.lax.scan(lambda c, x: (c + out(p, x)[0], None), 0.0, x)[0] / len(x)

    with pytest.warns(
        UserWarning, match="cannot see whether the loss is a mean over separate examples: a loop"
    ):
        blr.explain(loss, P, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = blr.per_example(loss, P, X)
    assert jnp.allclose(found.value, loss(P, X))


def test_a_loss_of_one_batch_size_only_says_so():
    with pytest.raises(TypeError) as error:
        blr.per_example(lambda p, x: jnp.mean(one(p, x) - Y), P, X)
    assert any("it must take any size" in note for note in error.value.__notes__)


# --- bad input ------------------------------------------------------------------------------------


def squares(p, x, y):
    return jnp.mean((x @ p["w"] - y[:, None]) ** 2)


LOGITS = {"outputs": lambda p, x, y: out(p, x), "likelihood": "categorical"}
PASSED = {
    r"parameter \['w'\] has dtype int32": (squares, {"w": jnp.ones((5, 3), int)}),
    r"other than through its first argument.*\['w'\]": (lambda p, x, y: squares(P, x, y), P),
    r"must return one number.*\(1, 3\)": (lambda p, x, y: out(p, x), P),
    r"must return one number.*\(\), \(1, 3\)": (lambda p, x, y: (jnp.mean(x), out(p, x)), P),
}


@pytest.mark.parametrize("message", PASSED)
def test_bad_losses_and_parameters(message):
    loss, params = PASSED[message]
    for ask in (blr.per_example, blr.explain):
        with pytest.raises(ValueError, match=message):
            ask(loss, params, X, Y)
    with pytest.raises(ValueError, match=message):
        blr.per_example_dot(loss, params, params, X, Y)


OPTIONS = {
    r"statistics='norms'; give a tuple of sum_squares": {"statistics": "norms"},
    r"statistics=\('hessian',\)": {"statistics": ("hessian",)},
    r"ggn_diagonal and kfac need the model's outputs": {"statistics": ("ggn_diagonal",)},
    r"outputs=.*likelihood= one of categorical, bernoulli": {"statistics": ("kfac",)},
    r"need the model's outputs and": {
        "statistics": ("kfac",), "outputs": lambda p, x, y: out(p, x),
    },
    r"likelihood='poisson' is unknown; known: categorical": {
        "statistics": ("kfac",), **LOGITS, "likelihood": "poisson",
    },
    r"labels='own' is unknown; known: exact, sampled, true": {"labels": "own"},
    r"positions='sum' is unknown; known: expand, reduce": {"positions": "sum"},
    r'labels="true" with ggn_diagonal is the empirical Fisher': {
        "statistics": ("ggn_diagonal",), "labels": "true",
    },
    r'labels="sampled" needs key=': {"statistics": ("kfac",), **LOGITS, "labels": "sampled"},
    r"outputs must return floating-point \[B, ..., k\]": {
        "statistics": ("kfac",), **LOGITS, "outputs": lambda p, x, y: one(p, x),
    },
    r"outputs: the loss couples its examples": {
        "statistics": ("kfac",), **LOGITS, "outputs": lambda p, x, y: out(p, x - x.mean(0)),
    },
    r"microbatch=4 must divide the batch of 6": {"microbatch": 4},
    r"microbatch=0 must divide": {"microbatch": 0},
    r"weights has shape \(3,\); give one number per example, \(6,\)": {"weights": jnp.ones(3)},
}  # fmt: skip


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options(message):
    with pytest.raises(ValueError, match=message):
        blr.per_example(squares, P, X, Y, **OPTIONS[message])


def test_bad_batches():
    for batch in ((X, Y[:3]), (X, 2.0), ()):
        for ask in (blr.per_example, blr.explain):
            with pytest.raises(ValueError, match="the same leading axis of examples"):
                ask(squares, P, *batch)


def test_bad_direction():
    with pytest.raises(ValueError, match=r"v: wrong tree structure"):
        blr.per_example_dot(squares, P, {"b": P["b"]}, X, Y)
    with pytest.raises(ValueError, match=r"v: leaf \['w'\] has shape"):
        blr.per_example_dot(squares, P, {**P, "w": jnp.ones(2)}, X, Y)


# --- the way of each parameter --------------------------------------------------------------------


def explained(capsys, loss, params, *batch):
    blr.explain(loss, params, *batch)
    lines = capsys.readouterr().out.splitlines()
    return [re.split(r"\s{2,}", line) for line in lines]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_ways(x64, capsys, row):
    shapes = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    head, *lines = explained(capsys, row.loss, shapes(row.params), *shapes(row.batch))
    assert head == ["parameter", "shape", "way", "why", "extra multiply-adds"]
    found = {name: way for name, _, way, *_ in lines}
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(row.params)]
    expected = dict.fromkeys(names, "places") | {f"['{k}']": v for k, v in row.ways.items()}
    assert found == expected


WHY = {
    "tied_small": {"w": "used 2 times", "v": "dense"},
    "tied_large": {"w": "used 2 times", "v": "joins the larger part"},
    "lora": {"A": "dense", "w": "no gradient"},
    "lstm_small": {"wh": "a constant of `scan`: used at every step", "o": "dense"},
    "scan_layers": {"w": "dense, scan", "s": "a constant of `scan`: used at every step"},
    "broadcasts": {"free": "not used by the loss", "w": "dense"},
    "convnet": {"k": "conv", "d": "conv", "t": "conv", "s": "copy"},
    "embedding_large": {"e": "lookup"},
    "nonlinear_large": {"w": "used by `mul`", "v": "joins the larger part"},
}


@pytest.mark.parametrize("name", WHY)
def test_why(x64, name):
    row = ROWS[name]
    ways = traced(row.loss, row.params, row.batch).ways
    reasons = {k: way.reason for k, way in zip(sorted(row.params), ways, strict=True)}
    assert {k: reasons[k] for k in WHY[name]} == WHY[name]


def test_explain_prints_a_table(capsys):
    loss = lambda p, x: jnp.mean((jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]) ** 2)  # noqa: E731
    blr.explain(loss, {"w": jnp.ones((3, 3)), "v": jnp.ones((3, 4))}, jnp.ones((8, 3)))
    assert capsys.readouterr().out.splitlines() == [
        "parameter  shape   way     why           extra multiply-adds",
        "['v']      (3, 4)  places  dense         96",
        "['w']      (3, 3)  copy    used 2 times  72",
    ]
