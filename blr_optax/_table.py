"""The table of algorithms, as data: which choices make which function, and which test proves it."""

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
        test: file and function that prove the case, under tests/.
    """

    group: str
    algorithm: str
    family: str
    approximation: str
    function: str
    test: str


_ROWS = (
    TableRow(OPTIMISATION, "Gradient descent", "gaussian_fixed", "delta", "gradient_descent",
             "test_derivations.py::test_gradient_descent_is_a_known_unit_covariance"),
    TableRow(OPTIMISATION, "Newton's method", "gaussian", "delta, rate 1", "newton",
             "test_derivations.py::test_newton_is_newton"),
    TableRow(OPTIMISATION, "Online Newton", "gaussian", "delta", "online_newton",
             "test_derivations.py::test_online_newton_formula"),
    TableRow(OPTIMISATION, "Multimodal optimisation", "mixture", "delta at every component",
             "mixture_newton",
             "test_multimodal.py::test_far_components_are_newton_iterations_of_their_own"),
    TableRow(OPTIMISATION, "Kronecker online Newton", "matrix_gaussian",
             "delta",
             "kronecker_newton", "test_structured.py::test_the_kronecker_step_written_out"),
    TableRow(OPTIMISATION, "Low-rank online Newton", "gaussian_low_rank", "delta",
             "low_rank_newton", "test_structured.py::test_the_low_rank_step_written_out"),
    TableRow(DEEP, "SGD", "gaussian_fixed", "delta, mini-batches", "sgd",
             "test_derivations.py::test_sgd_is_the_known_covariance_step_size_over_ess"),
    TableRow(DEEP, "RMSprop", "gaussian_diagonal",
             "delta, squared mini-batch gradient; square root", "rmsprop",
             "test_derivations.py::test_rmsprop_is_the_rule_with_squares_up_to_the_root"),
    TableRow(DEEP, "Adam", "gaussian_diagonal",
             "delta, squared mini-batch gradient; square root, momentum, bias correction", "adam",
             "test_derivations.py::test_adam_posterior_is_the_preconditioner"),
    TableRow(DEEP, "SAM", "gaussian_fixed",
             "delta; the worst point of a ball in place of the expectation", "sam",
             "test_sam.py::test_sam_without_radius_is_sgd_and_bsam_with_one_the_worst_point"),
    TableRow(DEEP, "bSAM", "gaussian_diagonal",
             "one sample, size of the gradient; adversary, old precision, momentum, damping",
             "bsam",
             "test_sam.py::test_bsam_without_adversary_is_the_rule"),
    TableRow(DEEP, "Dropout", "mixture",
             "delta given the masks, responsibilities of one; any inner row", "dropout",
             "test_dropout.py::test_the_rule_for_a_unit_is_the_mixtures_with_a_responsibility_of_one"),
    TableRow(DEEP, "STE", "rademacher",
             "delta at the most likely signs, no entropy; Adam, clipping", "ste",
             "test_binary.py::test_ste_is_the_rule_without_entropy_at_the_most_likely_signs"),
    TableRow(DEEP, "BayesBiNN", "rademacher", "one sample, concrete relaxation", "bayesbinn",
             "test_binary.py::test_bayesbinn_is_the_rule_with_the_concrete_relaxation"),
    TableRow(DEEP, "Vprop", "gaussian_diagonal",
             "one sample, squared mini-batch gradient; square root", "vprop",
             "test_golden_vadam.py::test_vprop_is_the_rule_with_squares_up_to_the_root"),
    TableRow(DEEP, "Vadam", "gaussian_diagonal",
             "one sample, squared mini-batch gradient; square root, momentum, bias correction",
             "vadam", "test_golden_vadam.py::test_vprop_is_the_rule_with_squares_up_to_the_root"),
    TableRow(DEEP, "OGN", "gaussian_diagonal", "delta, squares of single examples", "ogn",
             "test_vogn.py::test_ogn_is_the_rule_with_the_delta_method"),
    TableRow(DEEP, "VOGN", "gaussian_diagonal", "one sample, squares of single examples", "vogn",
             "test_vogn.py::test_vogn_is_the_rule_with_squares_of_examples"),
    TableRow(DEEP, "SOBA", "gaussian_diagonal", "one sample, reparameterised Hessian, retraction",
             "soba",
             "test_derivations.py::test_ivon_and_soba_are_the_second_order_natural_step"),
    TableRow(DEEP, "IVON", "gaussian_diagonal",
             "one sample, reparameterised Hessian, retraction; momentum, rescaled rate", "ivon",
             "test_derivations.py::test_ivon_and_soba_are_the_second_order_natural_step"),
    TableRow(DEEP, "IVON for LoRA", "gaussian_diagonal",
             "IVON's; a prior per matrix that follows the posterior, without its pull on the mean",
             "ivon_lora",
             "test_lora.py::test_a_step_is_the_rule_with_the_prior_of_that_step"),
    TableRow(DEEP, "Mixture of IVONs", "mixture",
             "IVON's for every component, responsibilities", "mixture_ivon",
             "test_mixture_ivon.py::test_a_step_is_the_rules_with_the_control_variates"),
    TableRow(DEEP, "EVON", "gaussian_diagonal",
             "IVON's, along the eigenvectors of Shampoo's factors", "evon",
             "test_evon.py::test_it_is_the_rule_in_the_basis"),
    TableRow(DEEP, "Lie group, additive", "gaussian_fixed", "samples; momentum", "lie_additive",
             "test_lie_group.py::test_additive_is_the_rule_for_a_known_covariance"),
    TableRow(DEEP, "Lie group, affine", "gaussian_diagonal",
             "samples, to first order in the rate; exponential step, momentum", "lie_affine",
             "test_lie_group.py::test_affine_is_the_natural_step_to_first_order"),
    TableRow(DEEP, "Lie group, multiplicative", "weibull",
             "samples, to first order in the rate; exponential step, momentum",
             "lie_multiplicative",
             "test_lie_group.py::test_multiplicative_rayleigh_is_the_natural_step_to_first_order"),
    TableRow(INFERENCE, "Conjugate Bayes, ridge", "gaussian", "none, rate 1", "natural_step",
             "test_natural_step.py::test_conjugate_bayes_in_one_step_from_any_start"),
    TableRow(INFERENCE, "Laplace", "gaussian", "delta, at the fixed point", "newton",
             "test_golden_glm_vi.py::test_newton_reaches_the_laplace_approximation"),
    TableRow(INFERENCE, "Variational online Newton", "gaussian", "samples or quadrature",
             "variational_online_newton",
             "test_derivations.py::test_variational_online_newton_formula"),
    TableRow(INFERENCE, "Variational message passing", "gamma",
             "loss of mu, rate 1; a Product with other families",
             "blr_update", "test_blr_families.py::test_a_product_is_variational_message_passing"),
    TableRow(INFERENCE, "Non-conjugate VI, Gaussian mixtures", "mixture", "samples", "multimodal",
             "test_multimodal.py::test_recorded_trajectories_of_the_improved_rule"),
    TableRow(INFERENCE, "Non-conjugate VI with mixtures", "skew_gaussian", "none", "blr_update",
             "test_families_conditional.py::test_skew_step_is_the_chain_rule_in_expectation_coordinates"),
)  # fmt: skip


class Table(tuple):
    """Rows that print as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Aligned columns, one line per row, a heading per group."""
        columns = ("algorithm", "family", "approximation", "function", "test")
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
    """The table of Khan and Rue, as far as this library goes: all rows, and what proves each.

    Returns:
        `TableRow` entries: group, algorithm, family, approximation, function, test; printing shows
        them.

    Source: Khan and Rue (2023), Table 1, with the rows that came after it.

    Example:
      >>> import blr_optax as blr
      >>> row = blr.table()[0]
      >>> print(row.algorithm, "|", row.family, "|", row.approximation, "|", row.function)
      Gradient descent | gaussian_fixed | delta | gradient_descent
    """
    return Table(_ROWS)
