"""The memory a run will need, estimated before it starts, and the CPU allocator's settings.

Imports adapted_model and what is below it.
"""
