"""Measures how good a model is: its validation loss.

May import adapted_model and the folders below it.
"""
