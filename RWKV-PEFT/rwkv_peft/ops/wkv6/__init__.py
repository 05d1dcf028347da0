"""The WKV6 operator: its definition (`reference.py`), the public function and the choice of a backend (`op.py`).

The backends are `native.py` (compiled, sources in cuda/wkv6), `fla.py` and `chunked.py` (plain torch). This package
imports only `build` from the other operators.
"""
