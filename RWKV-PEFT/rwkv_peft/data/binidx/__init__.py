"""Token files on disk: the memory-mapped reader, the writer, loss-mask files, and a pair's identity.

Imports errors, console, files and data/tokenizer.py; identity.py also imports data/rows.
"""
