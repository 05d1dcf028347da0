"""The prime of RWKV-LM's walk over a token stream, computed where RWKV-LM has it typed as `--magic_prime`."""

from __future__ import annotations

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Enough for Miller and Rabin's test to be exact below 2**64 (Sorenson and Webster 2015)."""


def walk_prime(tokens: int, ctx_len: int) -> int | None:
    """RWKV-LM's magic_prime: the largest prime 3n + 2 below tokens / ctx_len - 1; None where there is none."""
    largest = -(-(tokens - ctx_len) // ctx_len) - 1  # the largest integer below tokens / ctx_len - 1
    for candidate in range(largest, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    return None


def is_prime(n: int) -> bool:
    """Exact for n below 2**64."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(n, witness, odd, twos) for witness in _WITNESSES)


def _passes(n: int, witness: int, odd: int, twos: int) -> bool:
    x = pow(witness, odd, n)
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False
