"""Distances between outputs."""

import math

import pytest
import torch

from lightning_ntk.functional import prediction_rmse, predictions, taylor_gap


def test_rmse_of_known_outputs() -> None:
    assert prediction_rmse(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)) == pytest.approx(math.sqrt(12.5))
    assert math.isnan(prediction_rmse(torch.zeros(0, 2), torch.zeros(0, 2)))


def test_outputs_in_parts_are_those_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now, linearized, start = torch.randn(3, 4, 5, 11).unbind()
    whole = prediction_rmse(now, linearized), taylor_gap(now, linearized, start)
    monkeypatch.setattr(predictions, "_PART", 7)
    assert (prediction_rmse(now, linearized), taylor_gap(now, linearized, start)) == pytest.approx(whole, rel=1e-12)
    assert prediction_rmse(now.mT, linearized.mT) == pytest.approx(whole[0], rel=1e-12)


def test_outputs_that_have_not_changed() -> None:
    start = torch.ones(2, 3)
    assert taylor_gap(start, start, start) == 0
    assert taylor_gap(start, start + 1, start) == math.inf
    assert math.isnan(taylor_gap(start, start, start + math.nan))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`outputs` \(3, 1\), `linearized_outputs` \(3,\)"):
        prediction_rmse(torch.ones(3, 1), torch.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        taylor_gap(torch.ones(3, 1), torch.ones(3, 1), torch.ones(3))
