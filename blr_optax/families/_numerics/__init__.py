"""Special functions, solvers and samplers, exact where jax.scipy loses digits."""
