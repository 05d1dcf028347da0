"""The WKV6 operator: its reference, the choice of a backend, and the backends.

Imports the other operators' shared parts (`ops/build.py`) only; sources are in cuda/wkv6.
"""
