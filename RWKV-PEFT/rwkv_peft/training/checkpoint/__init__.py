"""Checkpoints: when they are saved, what is in them, and how a run resumes from one.

Imports training/distributed for gathering sharded tensors.
"""
