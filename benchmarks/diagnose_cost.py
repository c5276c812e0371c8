"""What the quick level of the diagnostics costs, in passes, beside standard AutoAttack on the same images.

AutoAttack is counted as it runs when every image stands: about 1000 gradients and 5000 queries an image, which the
forecast of ``robeval attack --dry-run`` gives for the model at hand. A gradient counts as three forward passes. The
quick level looks at 256 images at most, so its share falls with the size of the set. Prints one JSON line.

    python -m benchmarks.diagnose_cost [--images 1000] [--model honest-adv]
"""

from __future__ import annotations

import argparse
import json
import tempfile

import torch

from robeval.diagnose.run import Settings, diagnose
from robeval.engine.backend import Backend
from robeval.evaluate.attacking import clean_pass
from robeval.evaluate.forecast import forecast
from robeval.evaluate.settings import Settings as Attacks
from robeval.evaluate.suites import suite
from tests import planted

#: Forward passes that a gradient is worth, its own forward pass included.
GRADIENT = 3


def work(forwards: float, backwards: float) -> float:
    """Passes in units of one forward pass."""
    return forwards + (GRADIENT - 1) * backwards


def main(argv: list[str] | None = None) -> None:
    """Count both on an adversarially trained network and print the share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="images that AutoAttack sees")
    parser.add_argument("--model", default="honest-adv", help="a name of tests/planted.py")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, these = planted.model(asked.model), planted.chosen(min(256, asked.images))
    specs, _, _ = suite("autoattack", planted.NORM)
    settings = Attacks(specs, planted.NORM, [planted.EPS]).for_classes(model.classes)
    clean = clean_pass(Backend(model), these)
    correct = clean.argmax(1) == these.y
    cost = forecast(settings, these[correct], clean[correct], Backend(model))
    with tempfile.TemporaryDirectory() as folder:
        rows = diagnose(model, these, Settings(planted.NORM, planted.EPS), root=folder).frame()
    autoattack = work(cost.forwards, cost.backwards) * asked.images * float(correct.double().mean())
    quick = work(int(rows["forwards"].sum()), int(rows["backwards"].sum()))
    costliest = rows.assign(work=work(rows["forwards"], rows["backwards"])).nlargest(5, "work")
    found = {
        "images": asked.images,
        "diagnosed": len(these),
        "autoattack": round(autoattack),
        "quick": round(quick),
        "share": round(quick / autoattack, 4),
        "costliest": dict(zip(costliest["id"], costliest["work"].astype(int).tolist(), strict=True)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
