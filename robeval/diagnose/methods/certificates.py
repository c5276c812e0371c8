"""Does an attack break what a proof covers?"""

from __future__ import annotations

import math

import pandas as pd

from robeval.core.catalogue import diagnostic
from robeval.core.records import CLEAN
from robeval.diagnose.finding import CLEAR, FAILED, NOT_RUN, Finding, not_run, wilson
from robeval.diagnose.subject import Subject

#: A radius and a distance are told apart when they differ by more than this share.
SLACK = 1e-6


@diagnostic(
    id="X7",
    group=4,
    level="quick",
    images="all",
    question="does an attack break a proven image?",
    limit="0 images",
    source="robeval",
)
def certificates(subject: Subject) -> Finding:
    """Holds proofs against every adversarial image at hand: stored attacks, and what the diagnostics found.

    An adversarial image closer than a proven radius means that the proof or the attack is wrong. Estimates and
    statements with a confidence about a smoothed model are not proofs and are left out.

    Cost:
        None.
    Source:
        None published.
    Departs:
        Nothing.
    """
    proofs = [store.frame() for store in subject.certificates]
    proven = pd.concat([f[(f["kind"] == "proof") & f["clean_correct"] & (f["radius"] > 0)] for f in proofs] or [_NONE])
    if not len(proven):
        return not_run("no proof for this model", NOT_RUN)
    wrong: set[int] = set()
    for norm, rows in proven.groupby("norm"):
        radius = rows.groupby("index")["radius"].max()
        nearest = _nearest(subject, str(norm)).reindex(radius.index).fillna(math.inf)
        wrong |= set(radius.index[nearest < radius * (1 - SLACK)].tolist())
    n = proven["index"].nunique()
    return Finding(
        FAILED if wrong else CLEAR,
        measured=f"{len(wrong)} of {n}",
        limit="0",
        n_images=n,
        flagged=sorted(wrong),
        interval=wilson(len(wrong), n),
        why=f"an adversarial image lies inside a proven radius ({len(wrong)} images): one of the two is wrong"
        if wrong
        else "",
        what_to_do="stop and look at one of these images; robeval verify checks the attack" if wrong else "",
    )


_NONE = pd.DataFrame({"index": [], "norm": [], "radius": []})


def _nearest(subject: Subject, norm: str) -> pd.Series:
    """Distance of the nearest known adversarial image, by image id."""
    parts = [
        frame.loc[frame["success"] & (frame["attack"] != CLEAN), ["index", f"distance_{norm}"]].set_axis(
            ["index", "distance"], axis=1
        )
        for frame in (store.frame() for store in subject.stores)
    ]
    ids = subject.images.ids.tolist()
    found = [(ids[one.position], one.decided.distances[norm]) for one in subject.found]
    parts.append(pd.DataFrame(found, columns=["index", "distance"]))
    return pd.concat(parts).groupby("index")["distance"].min()
