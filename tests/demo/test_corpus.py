"""The texts of the demo."""

from __future__ import annotations

from demo import corpus


def test_the_texts_are_real_and_reproducible():
    problems = list(corpus.math_problems(5, seed=1))
    assert problems == list(corpus.math_problems(5, seed=1))
    assert all(text.startswith("User: ") and "\n\nAssistant: " in text and "####" in text for text in problems)
    assert sum(len(text) for text in corpus.python_texts()) > 3_000_000
