"""Merges an adapter into its base model, and writes the formats that other programs read.

May import adapted_model and the folders below it.
"""
