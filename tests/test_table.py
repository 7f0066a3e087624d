"""`blr.table()`: every row names a function and a family that exist, and a test proves it."""

import ast
import functools

from tools import ROOT

import blr_optax as blr
from blr_optax._demo import cli

PROOFS = {
    "Gradient descent": (
        "optimizers/test_derivations.py",
        "test_gradient_descent_is_a_known_unit_covariance",
    ),
    "Newton's method": (
        "optimizers/test_derivations.py",
        "test_newton_is_newton",
    ),
    "Online Newton": (
        "optimizers/test_derivations.py",
        "test_online_newton_formula",
    ),
    "Multimodal optimisation": (
        "optimizers/test_mixture_newton.py",
        "test_far_components_are_newton_iterations_of_their_own",
    ),
    "Kronecker online Newton": (
        "optimizers/test_structured_newton.py",
        "test_the_kronecker_step_written_out",
    ),
    "Low-rank online Newton": (
        "optimizers/test_structured_newton.py",
        "test_the_low_rank_step_written_out",
    ),
    "SGD": (
        "optimizers/test_derivations.py",
        "test_sgd_is_the_known_covariance_step_size_over_ess",
    ),
    "RMSprop": (
        "optimizers/test_derivations.py",
        "test_rmsprop_is_the_rule_with_squares_up_to_the_root",
    ),
    "Adam": (
        "optimizers/test_derivations.py",
        "test_adam_posterior_is_the_preconditioner",
    ),
    "SAM": (
        "optimizers/test_sam.py",
        "test_sam_without_radius_is_sgd_and_bsam_with_one_the_worst_point",
    ),
    "bSAM": (
        "optimizers/test_sam.py",
        "test_bsam_without_adversary_is_the_rule",
    ),
    "Dropout": (
        "optimizers/test_dropout.py",
        "test_the_rule_for_a_unit_is_the_mixtures_with_a_responsibility_of_one",
    ),
    "STE": (
        "optimizers/test_bayesbinn.py",
        "test_ste_is_the_rule_without_entropy_at_the_most_likely_signs",
    ),
    "BayesBiNN": (
        "optimizers/test_bayesbinn.py",
        "test_bayesbinn_is_the_rule_with_the_concrete_relaxation",
    ),
    "Vprop": (
        "optimizers/test_golden_vadam.py",
        "test_vprop_is_the_rule_with_squares_up_to_the_root",
    ),
    "Vadam": (
        "optimizers/test_golden_vadam.py",
        "test_vprop_is_the_rule_with_squares_up_to_the_root",
    ),
    "OGN": (
        "optimizers/test_vogn.py",
        "test_ogn_is_the_rule_with_the_delta_method",
    ),
    "VOGN": (
        "optimizers/test_vogn.py",
        "test_vogn_is_the_rule_with_squares_of_examples",
    ),
    "SOBA": (
        "optimizers/test_derivations.py",
        "test_ivon_and_soba_are_the_second_order_natural_step",
    ),
    "IVON": (
        "optimizers/test_derivations.py",
        "test_ivon_and_soba_are_the_second_order_natural_step",
    ),
    "IVON for LoRA": (
        "optimizers/test_ivon_lora.py",
        "test_a_step_is_the_rule_with_the_prior_of_that_step",
    ),
    "Mixture of IVONs": (
        "optimizers/test_mixture_ivon.py",
        "test_a_step_is_the_rules_with_the_control_variates",
    ),
    "EVON": (
        "optimizers/test_evon.py",
        "test_it_is_the_rule_in_the_basis",
    ),
    "Lie group, additive": (
        "optimizers/test_lie_group.py",
        "test_additive_is_the_rule_for_a_known_covariance",
    ),
    "Lie group, affine": (
        "optimizers/test_lie_group.py",
        "test_affine_is_the_natural_step_to_first_order",
    ),
    "Lie group, multiplicative": (
        "optimizers/test_lie_group.py",
        "test_multiplicative_rayleigh_is_the_natural_step_to_first_order",
    ),
    "Conjugate Bayes, ridge": (
        "rule/test_natural_step.py",
        "test_conjugate_bayes_in_one_step_from_any_start",
    ),
    "Laplace": (
        "optimizers/test_golden_glm_vi.py",
        "test_newton_reaches_the_laplace_approximation",
    ),
    "Variational online Newton": (
        "optimizers/test_derivations.py",
        "test_variational_online_newton_formula",
    ),
    "Variational message passing": (
        "rule/test_blr_families.py",
        "test_a_product_is_variational_message_passing",
    ),
    "Non-conjugate VI, Gaussian mixtures": (
        "optimizers/test_mixture_newton.py",
        "test_recorded_trajectories_of_the_improved_rule",
    ),
    "Non-conjugate VI with mixtures": (
        "families/test_families_conditional.py",
        "test_skew_step_is_the_chain_rule_in_expectation_coordinates",
    ),
}


@functools.cache
def functions(file):
    body = ast.parse((ROOT / "tests" / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_rows_name_what_exists_and_what_proves_them():
    assert {row.algorithm for row in blr.table()} == set(PROOFS)
    for row in blr.table():
        assert callable(getattr(blr, row.function))
        assert blr.families.get(row.family) is not None
        assert row.group in ("optimisation", "deep learning", "approximate inference")
        file, name = PROOFS[row.algorithm]
        assert name in functions(file), f"{file} has no {name}"


def test_every_optimizer_has_a_row():
    """A new optimizer is one more row."""
    helpers = {"TorchIvon", "from_torch_ivon", "to_torch_ivon"}
    helpers |= {"orthogonalize", "random_signs", "round_stochastically", "signal_to_noise"}
    helpers |= {"relative_noise", "relative_prior"}
    assert set(blr.optimizers.__all__) - helpers <= {row.function for row in blr.table()}


def test_the_command_prints_it(capsys):
    assert cli.main(["table"]) == 0
    printed = capsys.readouterr().out
    for row in blr.table():
        assert row.algorithm in printed
        assert row.approximation in printed
    lines = printed.splitlines()
    assert lines[0].split() == ["algorithm", "family", "approximation", "function"]
    assert [line for line in lines if line.startswith("[")] == [
        "[optimisation]",
        "[deep learning]",
        "[approximate inference]",
    ]


def test_the_guide_to_optimizers_shows_every_function():
    page = (ROOT / "docs" / "choosing.md").read_text()
    for row in blr.table():
        assert f"`{row.function}`" in page or f"`blr.{row.function}`" in page, row.function
