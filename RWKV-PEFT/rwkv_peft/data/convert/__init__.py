"""From JSON, text and Parquet to binidx: sources, records to text, encoding, the cache and the command line.

Imports data/binidx, data/tokenizer.py and the validation split; never torch.
"""
