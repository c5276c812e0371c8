"""Tables 2 and 3 of Finlay and Oberman (arXiv:1905.11468) in small: l2 distances against their bounds, and L and C.

    python examples/finlay_tables.py --images 200 --epochs 15 --out finlay

Smooth and ReLU networks on digits, undefended, adversarially trained and with a penalty on the squared l2 gradient norm
(exact, and by finite differences). Trainings and runs resume. The bounds are the paper's: ESTIMATES on probabilities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import robeval as rv
from robeval.core import catalogue
from robeval.core.memory import keep_freed_memory
from robeval.data.load import load
from robeval.reports.regularity import improvement_ratio, regularity_table
from robeval.reports.tables import Cell, Table
from robeval.reports.writers import terminal
from robeval.train.job import Job, run_job
from robeval.train.recipe import Recipe

TRAININGS = {
    "undefended": "standard",
    "adversarial": "adv:steps=5",
    "penalty": "gn:weight=1.0",
    "penalty-fd": "fd-grad:weight=1.0",
}
#: Mean empirical distances are over two searches: each finds what the other misses.
ATTACKS = ["deepfool", "ddn"]
EPS = 0.5


def train(folder: Path, act: str, name: str, epochs: int) -> Path:
    recipe = Recipe(epochs=epochs, batch_size=64, optimizer="adam", lr=3e-3, norm="l2", eps=EPS)
    out = folder / f"{act}-{name}.pt"
    method = catalogue.parse("trainers", TRAININGS[name])
    run_job(Job(method, recipe, out, model_arguments={"act": act}, held_out=80), load("digits", "train"))
    return out


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", default="200")
    arguments.add_argument("--epochs", type=int, default=15)
    arguments.add_argument("--out", type=Path, default=Path("finlay"))
    options = arguments.parse_args()
    keep_freed_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Cell]] = []
    stores = []
    for act in ("smooth", "relu"):
        first: tuple[float, float] | None = None
        for name in TRAININGS:
            model = train(options.out, act, name, options.epochs)
            how = {"norm": "l2", "images": options.images, "out": options.out / "runs"}
            attacked = rv.attack(model, "digits", attacks=ATTACKS, each=True, **how)
            bounds = ["l-bound-paper", *(["c-bound-paper"] if act == "smooth" else [])]
            bounded = rv.certify(model, "digits", bounds=bounds, **how)
            stores.append(bounded.store)
            clean, distance = attacked.clean_accuracy(), float(attacked.distances().mean())
            row: dict[str, Cell] = {"model": model.stem, "clean": clean, "mean distance": distance}
            row |= {f"{bound} (ESTIMATE) mean": float(bounded.radii(bound).mean()) for bound in bounds}
            if first is None:
                first = distance, 1 - clean.value
            elif 1 - clean.value != first[1]:
                row["improvement ratio"] = improvement_ratio(distance, first[0], 1 - clean.value, first[1])
            rows.append(row)
            print(*row.values(), flush=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    title = "Mean l2 distance of the nearest adversarial image, and mean estimated bounds (table 2)"
    print(terminal(Table(title, columns, rows, ["misclassified images count 0"])))
    print(terminal(regularity_table(stores)))


if __name__ == "__main__":
    main()
