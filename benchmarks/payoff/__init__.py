"""Does a posterior pay? `python -m benchmarks.payoff`, the protocol in `docs/payoff.md`.

tables      features and labels of every data set, and the optional packages that bring them
tasks       a split of a task: standardised, noisy, and padded to one shape per kind
network     the padded networks, their losses, and the batches
methods     what trains: a transformation, its hyper-parameters and the box of its search
training    one compiled program per method and kind
scores      masked scores of padded predictions
run         `run_one`: scores of a method on a split
"""
