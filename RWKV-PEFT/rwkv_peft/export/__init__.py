"""Merging an adapter into its base, and writing formats other programs read.

Imports adapted_model and what is below it.
"""
