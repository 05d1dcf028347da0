"""report.html: one page per run, written from the run's config, metrics.jsonl and sample texts.

May import config, data and metrics_file. It does not import training, so a report can be written without a run.
"""
