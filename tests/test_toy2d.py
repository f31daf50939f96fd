"""examples/toy2d.py: optimal pairing in two dimensions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "examples" / "toy2d.py"
sys.path.insert(0, str(PAGE.parent))


@pytest.mark.slow
def test_optimal_pairs_make_the_flow_straight(tmp_path):
    """By its own command, from another folder."""
    for peer in ("scipy", "ot", "matplotlib"):
        pytest.importorskip(peer, reason="bench/requirements.txt is not installed")
    small = ["--seeds=1", "--iterations=1500", "--batch_size=64", "--n_test=300"]
    command = [sys.executable, str(PAGE), *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "toy2d.png").read_bytes()[1:4] == b"PNG"
    rows = re.findall(r"(I-CFM|OT-CFM) +(1 step|dopri5|curvature) +([-\d.]+) ", done.stdout)
    assert len(rows) == 12
    for task in (rows[:6], rows[6:]):
        found = {(pairing, name): float(value) for pairing, name, value in task}
        for name in ("1 step", "curvature"):
            assert found["OT-CFM", name] < 0.5 * found["I-CFM", name]


def test_wasserstein2_by_hand():
    ot = pytest.importorskip("ot")
    from toy2d import gaussians, moons, wasserstein2

    assert ot is not None
    a = torch.randn(50, 2)
    b = a[torch.randperm(50)] + torch.tensor([3.0, 4.0])
    assert wasserstein2(a, b) == pytest.approx(25, rel=1e-5)
    torch.manual_seed(0)
    assert gaussians(50_000).norm(dim=1).mean().item() == pytest.approx(5.03, abs=0.05)
    x = moons(50_000)  # both half circles centre on (0.5, 0.25), and smearing adds 0.1 on average
    assert x.mean(0).tolist() == pytest.approx([3 * 0.6 - 1, 3 * 0.35 - 1], abs=0.05)
