"""One file for each PEFT method: its options, its layer, and `METHOD`, which joins both.

Imports peft/base.py, peft/residual.py, config, ops and errors only. No other module tests for a method by its name.
"""
