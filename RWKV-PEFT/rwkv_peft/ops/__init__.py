"""Operators: WKV6, Bone, the element-wise steps of a block, products with a frozen matrix, and the training loss.

Each operator has a definition in plain PyTorch. Some also have compiled forms, whose sources are in cuda/ and which
`build.py` compiles on first use. This package may import `config`, `console`, `errors` and `files`.
"""
