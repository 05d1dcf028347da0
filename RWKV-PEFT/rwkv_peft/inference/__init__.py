"""Text generation with a base model, a merged model, or a base model and its adapter.

May import adapted_model and the folders below it.
"""
