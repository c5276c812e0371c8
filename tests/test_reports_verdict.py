"""The four verdicts in their fixed wording, the headline, and what keeps them honest."""

from __future__ import annotations

import pandas as pd
import pytest

from robeval.reports.stats import Rate
from robeval.reports.verdict import FOOT, Verdict, headline, lines, verdict


def rows(*told: tuple[str, str, str]) -> pd.DataFrame:
    """Id, result and why of each test."""
    return pd.DataFrame(
        [
            {
                "id": key, "group": 1 + "DGKXU".index(key[0]), "result": result, "why": why,
                "question": f"{key}?", "measured": "1", "limit": "0", "what_to_do": "mend it", "n_images": 100,
                "forwards": 20_000, "backwards": 10, "seconds": 1.0, "counterexamples": 2 * (key == "X4"),
            }
            for key, result, why in told
        ]
    )  # fmt: skip


CONTRACT = ("D1", "FAILED", "the model answers differently on the same input (31 of 256 images)")
CLEAR = ("G4", "clear", "")


def said(*told: tuple[str, str, str], **more: int) -> Verdict:
    return verdict(rows(*told), "standard", **more)


def test_a_broken_contract_forbids_the_number() -> None:
    end = said(CONTRACT, ("G1", "FAILED", "zero"), CLEAR)
    assert end.number == 1
    assert end.text == (
        "NOT USABLE: the robust accuracy above must not be quoted. Reason: D1 the model answers differently on the "
        "same input (31 of 256 images)."
    )
    assert not end.usable


def test_other_failures_are_signs() -> None:
    end = said(("G1", "FAILED", "a"), ("X1", "FAILED", "b"), CLEAR, ("K1", "warning", "c"))
    assert end.number == 2
    assert end.text == (
        "SIGNS OF A WEAK EVALUATION: 2 of 4 tests failed (G1, X1). The true robust accuracy is very likely lower than "
        "the number above."
    )
    assert end.usable
    assert not end.comparable


def test_warnings_alone() -> None:
    end = said(("G1", "warning", "a"), ("X1", "warning", "b"), CLEAR)
    assert (end.number, end.text) == (3, "NO FAILURE, 2 WARNINGS in 3 tests.")
    assert end.short == "standard, no failure, 2 warnings"
    assert said(("G1", "warning", "a")).text == "NO FAILURE, 1 WARNING in 1 test."


def test_nothing_seen_says_by_how_many() -> None:
    end = said(CLEAR, ("X3", "not run", "no source model; give one"), ("U1", "not run", "no feature layer"))
    assert end.number == 4
    assert end.text == "NO SIGN FOUND by 1 of 3 tests (2 not run: X3 no source model, U1 no feature layer)."
    assert end.comparable


def test_images_that_could_not_be_evaluated_forbid_the_fourth_verdict() -> None:
    end = said(CLEAR, unevaluated=2)
    assert end.number == 3
    assert end.text == "NO FAILURE, 0 WARNINGS in 1 test. 2 images could not be evaluated."


def test_a_diagnosis_that_stopped_half_way_is_never_the_fourth_verdict() -> None:
    end = said(CLEAR, planned=5)
    assert end.number == 3
    assert "INCOMPLETE: 4 of 5 tests are still to run." in end.text


def test_the_headline_carries_all_that_it_rests_on() -> None:
    assert headline(Rate(472, 1000), 5, "linf", 8 / 255, "standard, no failure, 1 warning") == (
        "robust accuracy <= 47.2 % (472 of 1000 images not broken by any of 5 attacks; 95 % interval of the sample "
        "44.1 to 50.3; Linf eps 8/255; diagnostics: standard, no failure, 1 warning)"
    )
    more = headline(Rate(90, 98), 1, "l2", 0.7, "not run", lowered=3, unevaluated=2, proven=4)
    for part in ("the one attack", "broke 3 more", "2 not evaluated", "4 not attacked: a proof", "L2 eps 0.7"):
        assert part in more
    assert "no image could be evaluated" in headline(Rate(0, 0), 1, "l2", 0.5, "not run")


@pytest.mark.parametrize("told", [(CONTRACT,), (CLEAR,), (("X4", "FAILED", "noise"),)])
def test_every_report_ends_with_what_it_cannot_show(told: tuple[tuple[str, str, str], ...]) -> None:
    frame = rows(*told, ("G7", "not run", "level full")) if told[0][0] != "D1" else rows(*told)
    end = verdict(frame, "quick")
    text = lines(frame, "quick", end, 360)
    assert FOOT in text
    assert end.text in text
    assert text[0].startswith("Diagnostics (quick, 100 images, ")
    assert lines(frame, "quick", end, 60)[0].startswith("Diagnostics (quick, 60 images, ")  # stored ones may be more
