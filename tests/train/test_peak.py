"""What the measure of memory on a CPU counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from addlang.train.peak import Peak, live_bytes

MEGABYTE = 1 << 18  # elements in fp32


def test_the_peak_is_what_was_there_and_the_most_that_was_alive_at_once() -> None:
    before = live_bytes()
    kept = nn.Parameter(torch.zeros(MEGABYTE))
    assert live_bytes() - before == 1 << 20
    with Peak() as peak:
        a = torch.ones(2 * MEGABYTE)
        del a
        b = torch.ones(MEGABYTE)
        c = b + 1
        del b
    assert peak.bytes - before == pytest.approx(3 << 20, rel=1e-4)  # and a scalar
    assert (len(kept), len(c)) == (MEGABYTE, MEGABYTE)


def test_what_was_before_the_beginning_does_not_count() -> None:
    before = live_bytes()
    with Peak() as peak:
        a = torch.ones(8 * MEGABYTE)
        del a
        b = torch.ones(MEGABYTE)
        peak.begin()
        c = torch.ones(MEGABYTE)
        del b
    assert peak.bytes - before == pytest.approx(2 << 20, rel=1e-4)
    assert len(c) == MEGABYTE


def test_views_count_once_and_what_backward_saves_counts() -> None:
    before = live_bytes()
    w = torch.zeros(MEGABYTE, requires_grad=True)
    view = w.detach()[: MEGABYTE // 2]
    assert live_bytes() - before == 1 << 20
    with Peak() as peak:
        y = (w * w).exp().sum()  # exp keeps its result
        y.backward()  # type: ignore[no-untyped-call]
    assert peak.bytes - before >= (1 << 20) * 4  # with the product, before it goes, or the gradients
    assert len(view) == MEGABYTE // 2
