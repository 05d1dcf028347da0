"""From text to batches: tokenizer, binidx pairs, rows, loss masks, and the data module for Lightning.

`open_data` (training_data.py) opens a run's data. Imports config, errors, console and files; only datamodule.py imports
Lightning.
"""
