"""Images that a proof already decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from robeval.core.classifier import Classifier
from robeval.core.errors import FileRefused
from robeval.core.images import Images
from robeval.store.find import runs


@dataclass(frozen=True)
class Certified:
    """What sound certificates say about the images of a run.

    Args:
        radius: Largest proven radius by image id.
        bound: The bound that proves it, by image id.
        source: Folders of the certificates; empty when none were asked for.
    """

    radius: dict[int, float] = field(default_factory=dict)
    bound: dict[int, str] = field(default_factory=dict)
    source: str = ""

    def covers(self, index: int, eps: float) -> bool:
        """No point within eps of this image is misclassified, so that no attack can succeed there."""
        return self.radius.get(index, -1.0) >= eps


def certified(folder: str, classifier: Classifier, images: Images, norm: str) -> Certified:
    """Read the proofs for these very images of this very model from runs of ``robeval certify``.

    Estimates and probabilistic bounds never count, nor do certificates of another norm.

    Raises:
        FileRefused: nothing proven about this model, data set and norm in the folder.
    """
    radius: dict[int, float] = {}
    bound: dict[int, str] = {}
    wanted = set(images.ids.tolist())
    for store in runs(folder):
        manifest = store.manifest()
        same = (
            manifest["kind"] == "certify"
            and manifest["model"]["fingerprint"] == classifier.fingerprint
            and manifest["data"]["fingerprint"] == images.facts()["fingerprint"]
            and manifest["threat"]["norm"] == norm
            and manifest["settings"].get("top_k", 1) == 1  # within the k best is not first
        )
        if not same:
            continue
        frame = store.frame()
        proofs = frame[(frame["kind"] == "proof") & (frame["status"] == "verified") & frame["clean_correct"]]
        for index, reach, label in zip(proofs["index"], proofs["radius"], proofs["bound"], strict=True):
            if int(index) in wanted and reach > radius.get(int(index), -1.0):
                radius[int(index)], bound[int(index)] = float(reach), str(label)
    if not radius:
        raise FileRefused(
            f"no proof about this model, these images and {norm} in {folder}",
            code="R05",
            why="estimates are no proofs, and a certificate holds for its own model, data and norm only",
            do="run robeval certify with a sound bound first, or leave --skip-certified out",
        )
    return Certified(radius, bound, folder)
