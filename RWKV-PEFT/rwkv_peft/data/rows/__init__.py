"""From documents to training rows: kinds of rows, packing, shuffle order, mixtures, loss masks, the validation split.

Imports data/binidx and data/tokenizer.py.
"""
