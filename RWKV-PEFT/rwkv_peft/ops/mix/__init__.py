"""The element-wise steps of a block (token-shift mixes, decay, gated norm): reference, dispatch and compiled form.

Imports the other operators' shared parts only; sources are in cuda/mix.
"""
