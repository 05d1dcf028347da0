"""JSON, text and Parquet to binidx: sources, records, templates, encoding, the cache and the command line.

Imports data/binidx and data/tokenizer.py; never torch.
"""
