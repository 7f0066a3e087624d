"""Recipes: optimizers for which only the numbers of examples and of steps have to be known.

    recipe  = blr.recipes.ivon(params, num_examples, num_steps)
    step    = blr.make_step(recipe.optimizer, loss)
    print(recipe)                                          every number that was chosen

    first posterior    N(params, (noise s)^2)              s: rms of a leaf's first values
    prior              N(0, (prior s)^2)
    ess                num_examples / temperature
    b2                 1 - 1 / num_steps                   the precision forgets its start by e
    learning rate      5 % warm-up, cosine to 0
    step of a weight   at most clip_step noise s

Inputs should be standardised. `tune` searches the one number that is worth it, the prior's width;
`temper` fits the posterior's width after training. Both use validation data.
"""

from blr_optax.recipes._recipe import LeafChoice, Recipe, bsam, evon, ivon, mixture_ivon, vogn
from blr_optax.recipes._temper import Tempered, temper
from blr_optax.recipes._tune import Tuned, tune

__all__ = [
    "LeafChoice",
    "Recipe",
    "Tempered",
    "Tuned",
    "bsam",
    "evon",
    "ivon",
    "mixture_ivon",
    "temper",
    "tune",
    "vogn",
]
