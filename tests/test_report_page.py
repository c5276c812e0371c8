"""The report: complete in itself, escaped, honest about what did not run, and readable in a real browser."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robeval.cli.report import originals_of
from robeval.core.records import AttackRecord, Certificate, Diagnosis
from robeval.reports.page import page
from robeval.store.find import runs
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore
from tests import browser

EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"' $x_1$"
N, EPS = 12, 8 / 255


def manifest(
    kind: str, *, name: str = "net", norm: str = "linf", argv: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    labels = more.pop("methods", [{"label": "pgd:steps=10", "search": "fixed", "source": f"source {name}"}])
    return new_manifest(
        kind,
        model={"name": name, "fingerprint": f"{name:f<64}"[:64], "classes": [f"<b>{k}" for k in range(3)]},
        data={"name": "toy/test", "fingerprint": "d" * 64, "images": N, "ids": list(range(N)), "subset": ""},
        threat={"norm": norm, "eps": [EPS] if kind != "certify" else more.pop("eps", [])},
        methods=labels,
        seed=0,
        settings=more.pop("settings", {"each": True}),
        argv=["attack", *argv],
    )


def attack_row(index: int, attack: str, *, success: bool, eps: float = EPS, example: int = -1) -> AttackRecord:
    clean = attack == "clean"
    d = 0.0 if clean else (eps * (index + 1) / N if success else float("inf"))
    return AttackRecord(
        index=index, label=index % 3, clean_prediction=index % 3, clean_correct=True, attack=attack, norm="linf",
        eps=0.0 if clean else eps, success=success and not clean, prediction=(index + 1) % 3, distance_linf=d,
        distance_l2=d, distance_l1=d, distance_l0=1.0 * (d > 0), margin=-1.0, attempt=0, iterations=1, forwards=3,
        backwards=2, first_success_forward=2 if success else -1, survives_8bit=True, seed=0, attack_config_hash="0",
        example=example,
    )  # fmt: skip


def attacked(root: Path, name: str = "net", *, broken: int = 5) -> RunStore:
    store = RunStore.create_or_open(root, manifest("attack", name=name, argv=(name, "--eps", "8/255")))
    store.append([attack_row(k, "clean", success=False) for k in range(N)])
    rows = [attack_row(k, "pgd:steps=10", success=k < broken, example=k if k < broken else -1) for k in range(N)]
    x = np.random.default_rng(0).random((broken, 1, 5, 5), dtype=np.float32)
    store.append(rows, x)
    store.close({"seconds": 1.0, "exit_code": 0})
    return store


def certified(root: Path, kind: str = "proof") -> RunStore:
    label = [{"label": "crown", "settings": {}, "search": ""}]
    store = RunStore.create_or_open(root, manifest("certify", methods=label, eps=[EPS], settings={}))
    rows = [
        Certificate(
            index=k, label=0, prediction=0, clean_correct=True, bound="crown", kind=kind, norm="linf", eps=EPS,
            status="verified" if k > 8 else "unknown", radius=EPS if k > 8 else 0.0, margin_lower=0.1, loss="cw",
            loss_value=-1.0, gradient_norm=1.0, curvature=float("nan"), constant=1.0, domain="ball",
            arithmetic="float32", residual=float("nan"), confidence=1.0, samples=0, forwards=1, backwards=1, seed=0,
            bound_config_hash="0",
        )
        for k in range(N)
    ]  # fmt: skip
    store.append(rows)
    store.close({"seconds": 1.0, "exit_code": 0})
    return store


def diagnosed(root: Path, results: dict[str, str], name: str = "net") -> RunStore:
    about = [{"label": i, "id": i, "group": int(i[1:])} for i in results]
    store = RunStore.create_or_open(
        root, manifest("diagnose", name=name, methods=about, settings={"level": "quick", "runs": [], "sources": []})
    )
    for key, result in results.items():
        row = dict.fromkeys((f for f in Diagnosis.__dataclass_fields__), "")
        numbers = dict.fromkeys(("n_images", "n_flagged", "counterexamples", "forwards", "backwards", "seed"), 0)
        floats = {"interval95_low": float("nan"), "interval95_high": float("nan"), "eps": EPS, "seconds": 0.1}
        told = {"id": key, "result": result, "question": f"question {EVIL}", "why": "because", "group": int(key[1:])}
        told |= {"what_to_do": f"mend {key}", "measured": "3 of 12", "limit": "0", "norm": "linf"}
        store.append([Diagnosis(**(row | numbers | floats | told))])
    store.close({"seconds": 1.0, "exit_code": 0})
    return store


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without pictures, for what the words say."""
    monkeypatch.setattr("robeval.reports.page.pictures", lambda kind, groups, originals: [])


class Seen(HTMLParser):
    """Tags and attributes of a page; void and foreign elements are no matter here."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def addresses(seen: Seen) -> list[str]:
    return [v for _, name, v in seen.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]


def test_everything_foreign_is_escaped_and_nothing_runs_or_is_fetched(tmp_path: Path) -> None:
    attacked(tmp_path, EVIL)
    diagnosed(tmp_path, {"D1": "clear", "G2": "FAILED"}, EVIL)
    seen = Seen(page(runs(tmp_path)))
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(seen.tags)
    assert not [name for _, name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert all(re.match(r"#|data:(image/png|text/csv);base64,|data:,$", a) for a in addresses(seen)), addresses(seen)
    assert ("title" in seen.tags) and "x onerror" not in str([a for a in seen.attributes if a[1] == "src"])
    policy = next(v for t, n, v in seen.attributes if t == "meta" and n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_ids_are_unique_and_links_lead_somewhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        attacked(tmp_path, name)
    seen = Seen(page(runs(tmp_path)))
    ids = [v for _, name, v in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {a[1:] for a in addresses(seen) if a.startswith("#")} <= set(ids)


def test_an_attack_alone_says_that_no_diagnosis_ran(plain: None, tmp_path: Path) -> None:
    attacked(tmp_path)
    text = page(runs(tmp_path))
    assert "diagnostics: not run" in text
    assert "&lt;= 58.3 %" in text and "7 of 12 images not broken by the one attack" in text
    assert "robeval attack net --eps 8/255" in text
    assert "certified" not in text.split("<main>")[1].split('<section id="provenance"')[0]


def test_certificates_alone_are_lower_bounds_and_estimates_are_none(plain: None, tmp_path: Path) -> None:
    certified(tmp_path / "proof")
    text = page(runs(tmp_path / "proof"))
    assert "&gt;= 25.0 %" in text and "certified (proof)" in text and "Nothing was attacked" in text
    certified(tmp_path / "estimate", "estimate")
    text = page(runs(tmp_path / "estimate"))
    assert "ESTIMATE" in text and "certified" not in text.split("<main>")[1].split('id="provenance"')[0]


@pytest.mark.parametrize(
    "results, dress, words",
    [
        ({"D1": "FAILED", "G2": "clear"}, "bad", "NOT USABLE"),
        ({"D1": "clear", "G2": "FAILED"}, "bad", "SIGNS OF A WEAK EVALUATION"),
        ({"D1": "clear", "G2": "warning"}, "warn", "NO FAILURE, 1 WARNING"),
        ({"D1": "clear", "G2": "clear"}, "plain", "NO SIGN FOUND"),
    ],
)
def test_the_verdict_stands_on_top_with_what_to_do(
    plain: None, tmp_path: Path, results: dict[str, str], dress: str, words: str
) -> None:
    attacked(tmp_path)
    diagnosed(tmp_path, results)
    text = page(runs(tmp_path))
    assert f'class="verdict {dress}"' in text and text.index(words) < text.index("<table>")
    assert "mend D1" in text and "They cannot show that it is strong" in text
    for banned in ("secure", "safe", "guaranteed", "no gradient masking", " passes "):
        assert banned not in text.split('id="provenance"')[0].split("<main>")[1], banned


def test_the_table_below_says_what_the_headline_above_says(plain: None, tmp_path: Path) -> None:
    """What a diagnostic broke counts in both, and both know the diagnosis."""
    attacked(tmp_path)  # 5 of 12
    diagnosed(tmp_path, {"D1": "clear", "X4": "clear"})
    methods = [{"label": "diagnostic:X4", "search": "fixed", "source": ""}]
    settings = {"each": False, "randomised": False, "counterexamples_of": "1"}
    extra = RunStore.create_or_open(tmp_path, manifest("attack", methods=methods, settings=settings))
    extra.append([attack_row(8, "clean", success=False), attack_row(8, "diagnostic:X4", success=True)])
    extra.close({"seconds": 1.0, "exit_code": 0})
    text = page(runs(tmp_path)).split('id="provenance"')[0]
    assert text.count("6 of 12 images not broken") >= 2 and "7 of 12" not in text
    assert "50.0 % [25.4, 74.6]" in text and "58.3 %" not in text.split("worst case")[1]
    assert "not run" not in text


def test_several_models_share_the_curves_and_keep_their_own_numbers(tmp_path: Path) -> None:
    attacked(tmp_path, "weak", broken=9)
    attacked(tmp_path, "strong", broken=2)
    certified(tmp_path)
    text = page(runs(tmp_path))
    assert "&lt;= 25.0 %" in text and "&lt;= 83.3 %" in text and "&gt;= 25.0 %" in text
    assert text.count("Accuracy against eps in Linf") >= 1


def test_the_gallery_shows_the_stored_pixels_beside_the_clean_ones(plain: None, tmp_path: Path) -> None:
    store = attacked(tmp_path)
    clean = {k: np.zeros((1, 5, 5), np.float32) for k in range(N)}
    text = page([store], {"d" * 64: clean})
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="(\w+)', text)
    assert [name for _, name in pictures] == ["clean", "adversarial", "difference"] * 5
    from io import BytesIO

    from PIL import Image

    shown = np.asarray(Image.open(BytesIO(base64.b64decode(pictures[1][0]))))
    frame = store.frame()
    stored = store.examples(frame[frame["example"] >= 0])
    assert any((np.round(255 * s[0]) == shown).all() for s in stored)
    assert len(re.findall(r'alt="adversarial', page([store]))) == 5


def test_two_pages_of_the_same_runs_are_the_same_bytes(tmp_path: Path) -> None:
    store = attacked(tmp_path)
    assert page([store]) == page([store])


def test_clean_images_of_a_set_that_is_gone_are_left_out_quietly(tmp_path: Path) -> None:
    assert originals_of([attacked(tmp_path)]) == {}


@pytest.mark.skipif(not browser.found(), reason="no Chromium here; install Debian's chromium to run this")
@pytest.mark.parametrize("width", [1440, 390])
def test_a_browser_fetches_nothing_complains_of_nothing_and_scrolls_one_way(tmp_path: Path, width: int) -> None:
    attacked(tmp_path / "runs", EVIL)
    attacked(tmp_path / "runs", "another model with a long name " * 3)
    diagnosed(tmp_path / "runs", {"D1": "clear", "D2": "FAILED", "G2": "warning"}, EVIL)
    file = tmp_path / "report.html"
    clean = {"d" * 64: {k: np.zeros((1, 5, 5), np.float32) for k in range(N)}}
    file.write_text(page(runs(tmp_path / "runs"), clean), encoding="utf-8")
    with browser.tab(browser.found(), tmp_path / "profile") as tab:
        for dark in (False, True):
            tab.open(file, width, dark=dark)
            assert [u for u in tab.requested if not u.startswith(("file://", "data:"))] == []
            assert tab.said == []
            wide, high = tab.value("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
            assert wide <= width and high > 1000
            assert tab.value("document.title").startswith("Robustness of " + EVIL)
            images = "[...document.querySelectorAll('img')].map(i => i.decode().then(() => i.naturalWidth))"
            assert set(tab.value(f"Promise.all({images})")) == {5}
            background = tab.value("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(18, 21, 26)" if dark else "rgb(246, 247, 249)")  # the style sheet is allowed
