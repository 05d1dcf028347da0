from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.data.rows.primes import is_prime, walk_prime


def by_trial(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def test_is_prime_of_small_numbers():
    assert [n for n in range(-3, 20_000) if is_prime(n)] == [n for n in range(20_000) if by_trial(n)]


@pytest.mark.parametrize("composite", [3215031751, 341550071728321, 3825123056546413051])
def test_composites_that_pass_with_few_witnesses(composite):
    assert not is_prime(composite)


def test_large_primes():
    assert is_prime(2**61 - 1)
    assert is_prime(18446744073709551557)


@pytest.mark.parametrize(("tokens", "ctx_len", "prime"), [(1498226207, 512, 2926181), (332115325534, 1024, 324331313)])
def test_primes_in_rwkv_lms_documentation(tokens, ctx_len, prime):
    """MiniPile is in its README, and the Pile in its training scripts."""
    assert walk_prime(tokens, ctx_len) == prime


@given(st.integers(1, 5000), st.integers(1, 40))
def test_walk_prime_is_the_largest_below_the_bound(tokens, ctx_len):
    smaller = [p for p in range(2, tokens) if p < tokens / ctx_len - 1 and p % 3 == 2 and by_trial(p)]
    assert walk_prime(tokens, ctx_len) == max(smaller, default=None)
