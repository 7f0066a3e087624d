"""`blr-optax demo`: train, predict and draw, from the command line."""
