"""Conditional families: not exponential themselves, with an exponential one inside."""
