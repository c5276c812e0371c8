"""robeval from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import robeval as rv
from robeval.core.errors import UsageError
from robeval.data.load import load


def test_attack_a_wrapped_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train, net = load("digits", "train"), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.x - 0.3), train.y).backward()
        optimizer.step()
    model = rv.wrap(net, classes=10, mean=[0.3], std=[1.0], name="linear")
    run = rv.attack(model, "digits", attacks=["pgd:steps=5", "deepfool"], eps=[0.05], images="60", out=tmp_path)
    assert run.clean_accuracy().n == 60
    assert run.worst_case(0.05).k < run.clean_accuracy().k
    assert run.worst_case(0.01).k >= run.worst_case(0.05).k
    assert run.verification.checked == run.verification.confirmed > 0
    frame = run.to_frame()
    assert set(frame["attack"]) == {"clean", "pgd:steps=5", "deepfool"}
    assert (run.distances() >= 0).all()
    assert run.table().rows[-1]["attack"] == "worst case"
    again = rv.attack(model, "digits", attacks=["pgd:steps=5", "deepfool"], eps=[0.05], images="60", out=tmp_path)
    assert again.store.folder == run.store.folder
    with pytest.raises(UsageError, match="unknown suite"):
        rv.attack(model, "digits", suite="slow", eps=0.1, out=tmp_path)


def test_certify_a_wrapped_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    train = load("digits", "train")
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.x), train.y).backward()
        optimizer.step()
    model = rv.wrap(net, classes=10, name="small")
    run = rv.certify(model, "digits", bounds=["ibp", "crown"], eps=[0.002, 0.02], images="20", out=tmp_path)
    near, far = (run.certified("crown", eps) for eps in (0.002, 0.02))
    assert near.n == far.n == 20
    assert near.k >= far.k
    assert near.k > 10
    assert run.certified("ibp", 0.02).k <= far.k
    assert len(run.to_frame()) == 2 * 2 * 20
    assert {row["bound"] for row in run.table().rows} == {"ibp", "crown"}
    radii = rv.certify(model, "digits", bounds=["crown"], images="20", out=tmp_path).radii("crown")
    assert int((radii >= 0.02).sum()) == far.k
    again = rv.certify(model, "digits", bounds=["ibp", "crown"], eps=[0.002, 0.02], images="20", out=tmp_path)
    assert again.store.folder == run.store.folder


def test_import_is_light_and_names_are_listed() -> None:
    code = (
        "import sys, robeval; assert 'torch' not in sys.modules; assert 'attack' in dir(robeval);"
        "robeval.Classifier; assert 'torch' in sys.modules; assert not hasattr(robeval, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""})
