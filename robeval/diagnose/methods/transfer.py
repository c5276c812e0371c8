"""Do images made for other models do better than the model's own gradient?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import BY_LOSS, attacked, by_gradients, by_loss, either, ids, images_of
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, not_run
from robeval.diagnose.subject import Subject


@diagnostic(
    id="X3",
    group=4,
    level="quick",
    images=1000,
    question="transfer weaker than the model's own gradient?",
    limit="0; FAILED when transfer breaks more",
    source="Athalye, Carlini, Wagner 2018, Obfuscated Gradients Give a False Sense of Security, arXiv:1802.00420,"
    " section 3.1; Ma et al. 2020, SOAR, arXiv:2004.01832, section 5.2 and appendix E.3",
)
def transfer(subject: Subject) -> Finding:
    """Images crafted on the margin of a source model, judged on this one.

    Fails when they break more images here than this model's own gradient does, on cross-entropy or on the margin: a
    detour cannot be better than the direct way. A single image that only transfer breaks warns.

    Cost:
        40 backward passes per image on each source and 2 forward passes here, besides the shared attacks.
    Source:
        Athalye et al. 2018, arXiv:1802.00420, section 3.1; Ma et al. 2020, arXiv:2004.01832, section 5.2.
    Departs:
        Compared loss by loss, so that a masked cross-entropy shows although another loss makes up for it.
    """
    if not subject.sources:
        return not_run("no source model; give one, such as an undefended model of the same architecture")
    images = subject.correct(images_of(subject))
    carried = {s.name: attacked(subject, BY_LOSS["margin"], images, on=s).broken for s in subject.sources}
    own = {loss: hit for loss, hit in by_loss(subject, images).items() if loss in ("ce", "margin")}
    most = max(int(hit.sum()) for hit in carried.values())
    beaten = [loss for loss, hit in own.items() if most > int(hit.sum())]
    only = either(carried.values()) & ~by_gradients(subject, images)
    count, n = int(only.sum()), len(images)
    seen = bool(beaten or count)
    why = [f"transferred images break {most}, more than its own gradient of {' and '.join(beaten)}"] if beaten else []
    why += [f"{count} images fall to transfer alone"] if count else []
    return Finding(
        FAILED if beaten else WARNING if seen else CLEAR,
        measured=f"{count} of {n} by transfer only; "
        + ", ".join(f"{name} {int(hit.sum())}" for name, hit in (carried | own).items())
        + " broken",
        limit="0; FAILED when transfer breaks more",
        n_images=n,
        flagged=ids(images, only),
        what_to_do="report the minimum over all attacks, transfer included; attack through a smooth stand-in (BPDA);"
        " innocent cause of a few images: a weak gradient attack"
        if seen
        else "",
        why="; ".join(why),
        data={name: int(hit.sum()) for name, hit in (carried | own).items()},
    )
