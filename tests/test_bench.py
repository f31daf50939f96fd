"""bench/toy2d.py at a small size: it runs as told, and straighter paths show already."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_toy2d(tmp_path):
    for peer in ("scipy", "ot", "matplotlib"):
        pytest.importorskip(peer, reason="bench/requirements.txt is not installed")
    small = [
        "--seeds=1",
        "--iterations=1500",
        "--batch_size=64",
        "--n_test=300",
        f"--picture={tmp_path}/toy.png",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "toy2d.py"), *small], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy.png").read_bytes()[1:4] == b"PNG"
    rows = re.findall(r"(I-CFM|OT-CFM) +(1 step|dopri5|curvature) +([-\d.]+) ", done.stdout)
    assert len(rows) == 12
    for task in (rows[:6], rows[6:]):
        found = {(pairing, name): float(value) for pairing, name, value in task}
        for name in ("1 step", "curvature"):
            assert found["OT-CFM", name] < 0.5 * found["I-CFM", name]


def test_wasserstein2_by_hand():
    ot = pytest.importorskip("ot")
    sys.path.insert(0, str(ROOT / "bench"))
    from toy2d import gaussians, moons, wasserstein2

    assert ot is not None
    a = torch.randn(50, 2)
    assert wasserstein2(a, a[torch.randperm(50)] + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-5)
    torch.manual_seed(0)
    assert gaussians(50_000).norm(dim=1).mean().item() == pytest.approx(5.03, abs=0.05)
    x = moons(50_000)  # the centre of both half circles together is (0.5, 0.25), smeared by 0.1 on average
    assert x.mean(0).tolist() == pytest.approx([3 * 0.6 - 1, 3 * 0.35 - 1], abs=0.05)
