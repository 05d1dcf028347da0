"""Metrics of a run: events, the progress line, loggers, metrics.jsonl and the start-up summary.

Imports config, memory and training/distributed.
"""
