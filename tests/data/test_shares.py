"""Shares of training tokens: worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from addlang.data.shares import language_shares, shares
from addlang.errors import AddlangError


def test_temperature_takes_the_root_of_the_sizes() -> None:
    assert np.allclose(shares([900, 100], [None, None]), [0.9, 0.1])
    assert np.allclose(shares([900, 100], [None, None], temperature=2), [0.75, 0.25])  # 30 : 10
    assert np.allclose(shares([900, 100], [None, None], temperature=1e9), [0.5, 0.5])


def test_temperature_acts_on_what_the_weights_leave() -> None:
    assert np.allclose(shares([900, 100, 5], [None, None, 0.2], temperature=2), [0.6, 0.2, 0.2])


def test_temperature_over_languages_ignores_how_a_language_is_cut_into_files() -> None:
    whole = language_shares([900, 100], [None, None], ["es", "ja"], language_weights={}, temperature=2)
    cut = language_shares([600, 300, 100], [None] * 3, ["es", "es", "ja"], language_weights={}, temperature=2)
    assert np.allclose(whole, [0.75, 0.25])
    assert np.allclose(cut, [0.5, 0.25, 0.25])


def test_language_weights_are_divided_within_the_language_by_the_datasets_weights() -> None:
    found = language_shares(
        [10, 10, 10, 30], [3.0, 1.0, None, None], ["es", "es", "ja", "ja"], language_weights={"es": 0.4}
    )
    assert np.allclose(found, [0.3, 0.1, 0.15, 0.45])


def test_a_weight_for_an_absent_language_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(AddlangError, match="Did you mean 'es'"):
        language_shares([1, 1], [None, None], ["es", "ja"], language_weights={"esp": 0.5})


def test_language_weights_that_leave_nothing_for_the_others_are_an_error() -> None:
    with pytest.raises(AddlangError, match="leave nothing"):
        language_shares([1, 1], [None, None], ["es", "ja"], language_weights={"es": 1.0})
