"""Bone: its layouts row, col and left, the paper's other variants, and the block products that all of them use.

The sources of the compiled block products are in cuda/bone. This package imports only `build` and `products` from the
other operators.
"""
