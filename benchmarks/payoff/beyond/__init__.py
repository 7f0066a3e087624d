"""Tasks beyond accuracy, a module each, all of one form; `parts` has them all.

jobs(records, optional)  what runs; `optional`: whether with data of `bench-data`
claims(records)          lines of the table of claims
section(records)         its part of the page, "" when nothing was measured
draw(records, folder)    its figure
"""
