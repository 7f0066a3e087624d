"""The table of algorithms, as data: which choices make which function."""

from __future__ import annotations

from typing import NamedTuple

OPTIMISATION, DEEP, INFERENCE = "optimisation", "deep learning", "approximate inference"


class TableRow(NamedTuple):
    """One algorithm as a special case of the rule.

    Attributes:
        group: "optimisation", "deep learning" or "approximate inference".
        algorithm: its name in the literature.
        family: registered name of the posterior's family.
        approximation: of the natural gradient, and what lies outside the rule.
        function: how to call it, a name in `blr_optax`.
    """

    group: str
    algorithm: str
    family: str
    approximation: str
    function: str


_ROWS = (
    TableRow(OPTIMISATION, "Gradient descent", "gaussian_fixed", "delta", "gradient_descent"),
    TableRow(OPTIMISATION, "Newton's method", "gaussian", "delta, rate 1", "newton"),
    TableRow(OPTIMISATION, "Online Newton", "gaussian", "delta", "online_newton"),
    TableRow(OPTIMISATION, "Multimodal optimisation", "mixture", "delta at every component",
             "mixture_newton"),
    TableRow(OPTIMISATION, "Kronecker online Newton", "matrix_gaussian",
             "delta",
             "kronecker_newton"),
    TableRow(OPTIMISATION, "Low-rank online Newton", "gaussian_low_rank", "delta",
             "low_rank_newton"),
    TableRow(DEEP, "SGD", "gaussian_fixed", "delta, mini-batches", "sgd"),
    TableRow(DEEP, "RMSprop", "gaussian_diagonal",
             "delta, squared mini-batch gradient; square root", "rmsprop"),
    TableRow(DEEP, "Adam", "gaussian_diagonal",
             "delta, squared mini-batch gradient; square root, momentum, bias correction", "adam"),
    TableRow(DEEP, "SAM", "gaussian_fixed",
             "delta; the worst point of a ball in place of the expectation", "sam"),
    TableRow(DEEP, "bSAM", "gaussian_diagonal",
             "one sample, size of the gradient; adversary, old precision, momentum, damping",
             "bsam"),
    TableRow(DEEP, "Dropout", "mixture",
             "delta given the masks, responsibilities of one; any inner row", "dropout"),
    TableRow(DEEP, "STE", "rademacher",
             "delta at the most likely signs, no entropy; Adam, clipping", "ste"),
    TableRow(DEEP, "BayesBiNN", "rademacher", "one sample, concrete relaxation", "bayesbinn"),
    TableRow(DEEP, "Vprop", "gaussian_diagonal",
             "one sample, squared mini-batch gradient; square root", "vprop"),
    TableRow(DEEP, "Vadam", "gaussian_diagonal",
             "one sample, squared mini-batch gradient; square root, momentum, bias correction",
             "vadam"),
    TableRow(DEEP, "OGN", "gaussian_diagonal", "delta, squares of single examples", "ogn"),
    TableRow(DEEP, "VOGN", "gaussian_diagonal", "one sample, squares of single examples", "vogn"),
    TableRow(DEEP, "SOBA", "gaussian_diagonal", "one sample, reparameterised Hessian, retraction",
             "soba"),
    TableRow(DEEP, "IVON", "gaussian_diagonal",
             "one sample, reparameterised Hessian, retraction; momentum, rescaled rate", "ivon"),
    TableRow(DEEP, "IVON for LoRA", "gaussian_diagonal",
             "IVON's; a prior per matrix that follows the posterior, without its pull on the mean",
             "ivon_lora"),
    TableRow(DEEP, "Mixture of IVONs", "mixture",
             "IVON's for every component, responsibilities", "mixture_ivon"),
    TableRow(DEEP, "EVON", "gaussian_diagonal",
             "IVON's, along the eigenvectors of Shampoo's factors", "evon"),
    TableRow(DEEP, "Lie group, additive", "gaussian_fixed", "samples; momentum", "lie_additive"),
    TableRow(DEEP, "Lie group, affine", "gaussian_diagonal",
             "samples, to first order in the rate; exponential step, momentum", "lie_affine"),
    TableRow(DEEP, "Lie group, multiplicative", "weibull",
             "samples, to first order in the rate; exponential step, momentum",
             "lie_multiplicative"),
    TableRow(INFERENCE, "Conjugate Bayes, ridge", "gaussian", "none, rate 1", "natural_step"),
    TableRow(INFERENCE, "Laplace", "gaussian", "delta, at the fixed point", "newton"),
    TableRow(INFERENCE, "Variational online Newton", "gaussian", "samples or quadrature",
             "variational_online_newton"),
    TableRow(INFERENCE, "Variational message passing", "gamma",
             "loss of mu, rate 1; a Product with other families",
             "blr_update"),
    TableRow(INFERENCE, "Non-conjugate VI, Gaussian mixtures", "mixture", "samples", "mixture_vi"),
    TableRow(INFERENCE, "Non-conjugate VI with mixtures", "skew_gaussian", "none", "blr_update"),
)  # fmt: skip


class Table(tuple):
    """Rows that print as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Aligned columns, one line per row, a heading per group."""
        columns = ("algorithm", "family", "approximation", "function")
        cells = [[getattr(row, name) for name in columns] for row in self]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

        def line(entries: tuple | list) -> str:
            return "  ".join(map(str.ljust, entries, widths)).rstrip()

        lines, group = [line(columns), line(["-" * w for w in widths])], None
        for row, entries in zip(self, cells, strict=True):
            if row.group != group:
                group = row.group
                lines.append(f"[{group}]")
            lines.append(line(entries))
        return "\n".join(lines)


def table() -> Table:
    """Return the table of Khan and Rue as far as this library goes, with the rows that came after.

    Returns:
        `TableRow` entries: group, algorithm, family, approximation, function; printing shows them.

    Source: Khan and Rue (2023), Table 1, with the rows that came after it.

    Example:
      >>> import blr_optax as blr
      >>> row = blr.table()[0]
      >>> print(row.algorithm, "|", row.family, "|", row.approximation, "|", row.function)
      Gradient descent | gaussian_fixed | delta | gradient_descent
    """
    return Table(_ROWS)
