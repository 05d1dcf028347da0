"""The element-wise steps of a block: token-shift mixes, decay, gated norm and squared ReLU.

`op.py` has the public functions and chooses between `reference.py` (plain torch) and `native.py` (compiled, sources in
cuda/mix). This package imports only `build` and `products` from the other operators.
"""
