"""Suites: attacks that run one after the other, by name or from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from robeval.core.catalogue import Spec, parse
from robeval.core.errors import FileRefused, UsageError, unknown


@dataclass(frozen=True)
class Suite:
    """Attacks in order.

    Args:
        about: One sentence for the list of suites.
        attacks: As on the command line. Those that do not exist in a norm are left out there, and the run says so.
        in_norm: Norms in which the suite is another one.
        each: Every attack sees every correctly classified image, as papers report them; otherwise only survivors.
    """

    about: str
    attacks: tuple[str, ...]
    in_norm: dict[str, tuple[str, ...]] = field(default_factory=dict)
    each: bool = False


MINIMAL = ("deepfool", "fmn", "ddn", "fab", "cw-l2", "logbarrier")
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
PLUS = ("apgd-ce:restarts=5", "apgd-dlr:restarts=5", "fab:restarts=5", "square", "apgd-t", "fab-t")

CHEAP = ("noise", "gaussian", "fgsm", "fgm", "pgd100", "cw20", "deepfool", "fmn")

SUITES: dict[str, Suite] = {
    "quick": Suite(
        "a first look in seconds; weaker than any number one would publish",
        ("fgsm", "fgm", "pgd:steps=10", "apgd-ce:steps=30", "deepfool:steps=20", "square:queries=200"),
    ),
    "white-box": Suite(
        "gradient attacks, from one step to 50 restarts and nine targets",
        ("fgsm", "fgm", "pgd20", "pgd100", "pgd20x50", "cw20", "apgd-ce", "apgd-t", "deepfool"),
    ),
    "black-box": Suite("attacks that see logits only", ("noise", "simba", "square")),
    "autoattack": Suite(
        "AutoAttack's standard version: APGD-CE, APGD-T, FAB-T with a descent from its nearest point, Square",
        STANDARD,
        {"l1": ("apgd-ce:restarts=5", "apgd-t:targets=5", "fab-t", "square")},
    ),
    "autoattack-plus": Suite(
        "AutoAttack's plus version: five restarts, untargeted DLR and FAB besides",
        PLUS,
        {"l1": tuple(a + (",staged=false" if ":" in a else ":staged=false") if "apgd" in a else a for a in PLUS)},
    ),
    "autoattack-rand": Suite(
        "AutoAttack's version for models that answer at random: gradients averaged over 20 passes",
        ("apgd-ce:samples=20", "apgd-dlr:samples=20"),
        {"l1": ("apgd-ce:samples=20,staged=false", "apgd-dlr:samples=20,staged=false")},
    ),
    "minimal-norm": Suite("the nearest adversarial image by six searches; needs no eps", MINIMAL, each=True),
    "finlay": Suite(
        "best distance over Carlini-Wagner, Boundary, LogBarrier and PGD (Finlay and Oberman 2019)",
        ("cw-l2", "boundary", "logbarrier", "pgd100"),
        each=True,
    ),
    "soar": Suite(
        "the attacks of the SOAR paper; AutoAttack's members run separately, as there",
        ("fgsm", "pgd20", "pgd100", "pgd200", "pgd1000", "pgd20x50", "simba", *STANDARD),
        {"l2": ("pgd:steps=100", *STANDARD)},
        each=True,
    ),
    "sgr": Suite(
        "the attacks of the SGR paper: random, one step, PGD with steps of eps/5, DeepFool, correlated noise",
        ("noise", "fgm", "fgsm", "pgd:relative_step=0.2,steps=10", "pgd40", "deepfool", "lrc"),
        each=True,
    ),
    "rat": Suite(
        "the attacks of the RAT paper: PGD-20 and CW-20 with steps of 0.003 (its eps is 0.031), and AutoAttack",
        ("pgd:step_size=0.003,steps=20", "cw20:step_size=0.003", *STANDARD),
    ),
    "full": Suite(
        "everything that gives a number its weight, cheap attacks first",
        (*CHEAP, *STANDARD, "pgd20x50", "simba", "lrc"),
    ),
}


def from_file(path: Path) -> Suite:
    """A suite from a TOML file with ``attacks = ["pgd:steps=50", "square"]`` and, if wanted, ``about`` and ``each``.

    Raises:
        FileRefused: missing, not TOML, or without a list of attacks.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileRefused(f"cannot read the suite {path}: {error.strerror}", code="F02") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileRefused(f"{path} is not TOML: {error}", code="F02") from None
    strange = sorted(set(told) - {"attacks", "about", "each"})
    if strange:
        raise unknown(f"entry of the suite {path}", strange[0], ("attacks", "about", "each"))
    attacks, each = told.get("attacks"), told.get("each", False)
    if not (isinstance(attacks, list) and attacks and all(isinstance(a, str) for a in attacks)):
        raise FileRefused(
            f"{path} names no attacks", code="F02", do='write attacks = ["pgd:steps=50,restarts=5", "square"]'
        )
    if not isinstance(each, bool):
        raise FileRefused(f"each in {path} must be true or false", code="F02")
    return Suite(str(told.get("about", "")), tuple(attacks), each=each)


def suite(name: str, norm: str) -> tuple[list[Spec], list[str], bool]:
    """The attacks of a suite that exist in a norm, the labels of those that do not, and whether each sees every image.

    Args:
        name: One of :data:`SUITES`, or a file that ends in ``.toml``.
        norm: Norm of the threat model.

    Raises:
        UsageError: unknown suite or attack, or nothing left in this norm.
        FileRefused: a file that is no suite.
    """
    if name.endswith(".toml"):
        chosen = from_file(Path(name))
    elif name in SUITES:
        chosen = SUITES[name]
    else:
        raise unknown("suite", name, SUITES)
    specs = [parse("attacks", text) for text in chosen.in_norm.get(norm, chosen.attacks)]
    mine = [s for s in specs if norm in s.method.facts["norms"]]
    if not mine:
        raise UsageError(f"no attack of the suite {name} exists in {norm}", code="A06", do="choose with --norm")
    return mine, [s.label for s in specs if s not in mine], chosen.each
