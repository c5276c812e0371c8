"""Accuracy under long-range-correlated noise at growing decay lengths: figure 3 of Roth et al. 2018 (arXiv:1805.08736).

    python examples/lrc_decay.py comparison/standard.pt comparison/gn.pt comparison/sgr-lrc.pt --data fashion-mnist \
        --images 300 --out lrc_decay

Noise of a standard deviation per pixel, the worst of 100 draws an image, cut to the box. All draws have the length
std * sqrt(d), so each point of a curve is an attack in l2; runs resume. Writes OUT.csv and OUT.png.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import matplotlib as mpl

import robeval as rv
from robeval.core.memory import keep_freed_memory
from robeval.data.load import load

mpl.use("Agg")
from matplotlib import pyplot


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("models", nargs="+", type=Path)
    arguments.add_argument("--data", default="fashion-mnist")
    arguments.add_argument("--images", default="300")
    arguments.add_argument("--std", type=float, default=0.3, help="standard deviation of every pixel")
    arguments.add_argument("--draws", type=int, default=100)
    arguments.add_argument(
        "--zeta", type=float, nargs="+", default=[1, 2, 4, 8, 12, 16], help="decay lengths in pixels"
    )
    arguments.add_argument("--runs", default="runs")
    arguments.add_argument("--out", type=Path, default=Path("lrc_decay"))
    options = arguments.parse_args()
    keep_freed_memory()
    eps = options.std * math.sqrt(load(options.data, "test").x[0].numel())
    rows = []
    for model in options.models:
        for zeta in options.zeta:
            attack = f"lrc:zeta={zeta:g},draws={options.draws}"
            how = {"norm": "l2", "eps": eps, "images": options.images, "out": options.runs}
            run = rv.attack(model, options.data, attacks=[attack], **how)
            rate = run.worst_case(eps)
            rows.append([model.stem, zeta, rate.value, *rate.interval, str(run.store.folder)])
            print(*rows[-1], flush=True)
    with open(options.out.with_suffix(".csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "zeta", "accuracy", "low", "high", "run"])
        table.writerows(rows)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row[0] for row in rows):
        mine = [row[1:5] for row in rows if row[0] == name]
        zeta, accuracy, low, high = zip(*mine, strict=True)
        (line,) = axes.plot(zeta, accuracy, marker="o", label=name)
        axes.fill_between(zeta, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="decay length in pixels", ylabel=f"accuracy, worst of {options.draws} draws", ylim=(0, 1))
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
