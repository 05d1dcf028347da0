"""Optimizer, learning-rate schedule, loss scaling, bad steps and LISA.

Imports config, peft and training/distributed.
"""
