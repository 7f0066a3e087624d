"""Posteriors of single optimizers: families that are read, joined and kept, but not learnt."""
