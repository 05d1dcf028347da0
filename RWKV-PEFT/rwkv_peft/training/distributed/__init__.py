"""Devices, launchers and strategies, and everything that touches private parts of DeepSpeed or Lightning.

Imports config and the packages themselves; no other folder of training.
"""
