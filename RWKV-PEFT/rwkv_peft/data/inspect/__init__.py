"""What a person sees of a data set: counts, documents with the tokens in the loss, and a run's first batches.

Imports the rest of data.
"""
