"""The tasks beyond accuracy, by the name under which the command line knows them."""

from types import ModuleType

from benchmarks.payoff.beyond import (
    active,
    bandit,
    language,
    pruning,
    rates,
    segmentation,
    shifted,
)

PARTS: dict[str, ModuleType] = {
    part.NAME: part for part in (rates, shifted, pruning, language, active, bandit, segmentation)
}
