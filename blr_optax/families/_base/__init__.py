"""The root of all families: exponential, conditional, their parameters, domains, registry."""
