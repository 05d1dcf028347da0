"""Shows a data set to people: counts, documents with their tokens in the loss highlighted, and a run's first batches.

Imports the rest of data.
"""
