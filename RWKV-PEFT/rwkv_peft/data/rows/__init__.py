"""From documents to training rows: row pickers, packing, order, mixtures, loss masks and the validation split.

Imports data/binidx.
"""
