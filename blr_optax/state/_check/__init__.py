"""`check`: what is wrong with an optimizer, a loss and a batch, in words, before the run."""

from blr_optax.state._check._preflight import check
from blr_optax.state._check._report import CheckReport, Finding

__all__ = ["CheckReport", "Finding", "check"]
