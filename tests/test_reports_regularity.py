"""Gradient norms and curvature of stored runs, and the adversarial improvement ratio."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from robeval.certification.run import certify
from robeval.certification.settings import Settings
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.errors import FileRefused
from robeval.core.smooth import SmoothReLU
from robeval.reports.regularity import improvement_ratio, regularity_table
from tests.problems import images


def test_the_table_of_a_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), SmoothReLU(), nn.Linear(8, 3)).double(), 3, "small"
    )
    x = torch.rand(9, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    these = images(x, torch.arange(9) % 3, 3)
    settings = Settings(choose("bounds", ["l-bound-paper", "c-bound-paper", "c-bound"], "l2"), "l2")
    store = certify(model, these, settings, root=str(tmp_path))
    table = regularity_table([store])
    frame = store.frame()
    assert [r["bound"] for r in table.rows] == ["l-bound-paper", "c-bound-paper", "c-bound"]
    for row in table.rows:
        own = frame[frame["bound"] == row["bound"]]
        assert (row["model"], row["images"], row["norm"]) == ("small", 9, "l2")
        assert row["mean gradient norm"] == pytest.approx(own["gradient_norm"].mean())
        assert row["largest gradient norm"] == pytest.approx(own["gradient_norm"].max())
        if row["bound"] == "l-bound-paper":
            assert "mean curvature" not in row
        else:
            assert row["largest curvature"] == pytest.approx(own["curvature"].max())
            assert row["largest curvature"] >= row["mean curvature"]
    paper = frame[frame["bound"] == "l-bound-paper"]
    assert table.rows[0]["largest gradient norm"] == pytest.approx(paper["constant"].iloc[0])
    assert "no bounds over regions" in table.title


def test_runs_without_gradients_are_refused() -> None:
    with pytest.raises(FileRefused, match="no gradient norm"):
        regularity_table([])


def test_the_papers_improvement_ratio() -> None:
    assert improvement_ratio(0.0407, 0.00662, 16.33, 4.36) == pytest.approx(1.88, abs=0.005)
    assert improvement_ratio(2.0, 1.0, 0.1, 0.05) == pytest.approx(1.0)
    assert improvement_ratio(0.5, 1.0, 0.1, 0.05) == pytest.approx(-0.5)
    for degenerate in ((1.0, 0.0, 0.1, 0.2), (1.0, 1.0, 0.1, 0.0), (1.0, 1.0, 0.1, 0.1)):
        assert math.isnan(improvement_ratio(*degenerate))
