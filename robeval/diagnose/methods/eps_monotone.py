"""Does a larger ball help the attack?"""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import attacked, ids, images_of, points, whole_box
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, share_failed
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K4",
    group=3,
    level="standard",
    images=1000,
    question="does a larger eps break no fewer?",
    limit="0; FAILED when surely above 1 %",
    source="Athalye, Carlini, Wagner 2018, Obfuscated Gradients Give a False Sense of Security, arXiv:1802.00420,"
    " section 3.1; Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705",
)
def eps_monotone(subject: Subject, *, steps: int = 20) -> Finding:
    """Counts images that are broken at a smaller eps and not at a larger one.

    Projected gradient ascent on cross-entropy at eps / 4, eps / 2, eps, 2 eps, 4 eps and the whole box. The smaller
    perturbation lies in the larger ball, so the truth is monotone; where the attack is not, it had to be carried over.

    Args:
        steps: Steps at each eps.

    Cost:
        6 times ``steps`` backward passes per image.
    Source:
        Athalye et al. 2018, arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705, section 5.
    Departs:
        The count of carried images is judged, not the curve, which carrying makes monotone. The mark of 1 % is ours:
        the random start of a larger ball may lose an image or two of an honest model.
    """
    images = subject.correct(images_of(subject))
    most = whole_box(subject.norm, images.x[0].numel())
    radii = sorted({min(f * subject.eps, most) for f in (0.25, 0.5, 1, 2, 4)} | {most})
    broken = torch.zeros(len(images), dtype=torch.bool, device=images.x.device)
    carried, curve = broken.clone(), [100.0]
    for radius in radii:
        now = attacked(subject, f"pgd:steps={steps},relative_step=0.25", images, eps=radius).broken
        carried |= broken & ~now
        broken |= now
        curve.append(100 - points(now.sum(), len(images)))
    count, n = int(carried.sum()), len(images)
    return Finding(
        FAILED if share_failed(count, n, 0.01) else WARNING if count else CLEAR,
        measured=f"{count} of {n}; {' / '.join(f'{a:.1f}' for a in curve)} %",
        limit="0; FAILED when surely above 1 %",
        n_images=n,
        flagged=ids(images, carried),
        what_to_do="attack with other losses and more steps, and start from the perturbation of the smaller eps;"
        " innocent cause of a few images: the random start of the larger ball"
        if count
        else "",
        why="a larger ball lost images that a smaller one broke" if count else "",
        data={"eps": [0.0, *radii], "accuracy": curve},
    )
