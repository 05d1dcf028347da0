"""Computes the prime of RWKV-LM's walk over the tokens, which RWKV-LM's users give as `--magic_prime`."""

from __future__ import annotations

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""With these, the Miller-Rabin test is exact below 2**64 (Sorenson and Webster 2015)."""


def walk_prime(tokens: int, ctx_len: int) -> int | None:
    """Return RWKV-LM's magic_prime: the largest prime 3n + 2 below tokens / ctx_len - 1; None if there is none."""
    largest = -(-(tokens - ctx_len) // ctx_len) - 1  # the largest integer below tokens / ctx_len - 1
    for candidate in range(largest, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    return None


def is_prime(n: int) -> bool:
    """Return whether n is prime. Exact below 2**64."""
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
