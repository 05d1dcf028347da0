"""report.html: one page per run, made from metrics.jsonl.

Imports config, data and training/metrics.
"""
