"""Layer taps: statistics of per-example gradients from one backward pass, for any JAX model.

_jaxpr     what is asked of JAX's internals, and nothing else of them anywhere
_places    where a parameter meets an activation: a custom derivative per kind of place
_equations what an equation does to a view of a parameter
_plan      which parameter goes which way, found from shapes alone
_run       the loss evaluated on all examples at once, with taps at the places
_sums      sums over a batch: one backward pass, and chunks for what the taps cannot do
_moments   sums of squares, norms and factors at one place
_mesh      meshes with explicit axes
_coupling  losses whose examples see each other, found from shapes alone
"""
