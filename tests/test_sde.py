"""examples/sde.py: the score from the velocity, and the flow's distributions kept under noise."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import ONE, TWO, cdf, exact_cfm, exact_ddpm
from exact import score as exact_score
from helpers import ROOT, here, refused
from PIL import Image

from sample import euler, flow

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from sde import euler_maruyama, score

METHODS = {"cfm": exact_cfm, "ddpm": exact_ddpm}
EXAMPLE = "examples/sde"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tau", [0.05, 0.4, 0.9])
def test_the_score_is_the_gradient_of_the_log_density(method, tau):
    z = torch.linspace(-2, 2, 9)[:, None]
    v = flow(METHODS[method](TWO))(tau, z)
    expected = exact_score(TWO, tau, torch.tensor(1 - tau).double(), z.double()).float()
    assert torch.allclose(score(tau, z, v), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_a_gaussian_stays_exact_whatever_the_noise(method, noise):
    """At a time on the way and at the end. With a score of half the size it would be too wide."""
    torch.manual_seed(0)
    model = METHODS[method](ONE)
    taus = [tau for tau in model.times(400) if tau < 1]
    _, mean, deviation = ONE[0]
    z = torch.randn(20_000, 1) * math.hypot(taus[0], 1 - taus[0])
    for part in (taus[:201], taus[200:] + [1.0]):
        z = euler_maruyama(flow(model), z, part, noise)
        tau = part[-1]
        assert z.mean().item() == pytest.approx(tau * mean, abs=0.015)
        assert z.std().item() == pytest.approx(math.hypot(tau * deviation, 1 - tau), rel=0.015)


def test_two_peaks_keep_their_shares_and_noise_moves_points_between_them():
    """Kolmogorov-Smirnov: the 0.1% limit is 1.95 / sqrt(n). The flow alone keeps each quantile."""
    torch.manual_seed(0)
    start, ranks = torch.randn(4000, 1), []
    for noise in (0.0, 3.0):
        x = euler_maruyama(flow(exact_cfm(TWO)), start, [i / 300 for i in range(301)], noise)
        quantile = cdf(TWO, 1.0, x.double()).flatten().sort().values
        gap = (quantile - (torch.arange(4000) + 0.5) / 4000).abs().max().item()
        assert gap < 1.95 / math.sqrt(4000)
        ranks.append(torch.corrcoef(torch.stack([start, x]).flatten(1))[0, 1].item())
    assert ranks[0] > 0.95 and ranks[1] < 0.3


def test_without_noise_it_is_eulers_method_and_the_last_step_adds_none():
    v, z = flow(exact_cfm(TWO)), torch.linspace(-2, 2, 9)[:, None]
    taus = [0.0, 0.3, 0.8, 1.0]
    assert torch.equal(euler_maruyama(v, z, taus, 0.0), euler(v, z, taus))
    assert torch.equal(euler_maruyama(v, z, taus[2:], 9.0), euler(v, z, taus[2:]))


def test_the_noise_of_a_step_by_hand():
    """From tau = 0.5, by 0.25, with v = 0: w = 2 noise (1 - tau)^2 = 1.5, score -z / 0.5."""
    z = torch.full((1, 1), 2.0)
    stepped = euler_maruyama(lambda tau, z: 0 * z, z, [0.5, 0.75], 3.0, torch.ones_like)
    assert stepped.item() == pytest.approx(2 - 0.25 * 0.75 * 4 + math.sqrt(1.5 * 0.25))


@pytest.mark.parametrize("method", METHODS)
def test_the_page_draws_by_its_own_command(method, tmp_path):
    """A row for each number. The same seed gives the same pictures, whatever the batch size."""
    run = f"--out_dir={ROOT / 'assets' / method}"
    some = ["--steps=3", "--n_samples=3", "--labels=7,1", "--device=cpu"]
    here(EXAMPLE, run, *some, "--noise=0,2", cwd=tmp_path)
    assert Image.open(tmp_path / "out" / "sde.png").size == (3 * 30 + 2, 2 * 30 + 2)
    for size in (2, 3):
        here(EXAMPLE, run, *some, "--noise=2", f"--save={size}.npz", f"--batch_size={size}",
             cwd=tmp_path)
    a, b = (np.load(tmp_path / f"{size}.npz") for size in (2, 3))
    assert a["arr_1"].tolist() == [7, 1, 7]
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1


def test_misuse_ends_in_one_line(tmp_path):
    cfm, ddpm = (f"--out_dir={ROOT / 'assets' / name}" for name in METHODS)
    for options, message in [
        ([cfm, "--noise=-1"], "(-1.0,) is not between 0"),
        ([cfm, "--save=x.npz"], "an .npz is for one number as --noise"),
        ([cfm, "--noise=1", "--save=x.gif"], "must end in .png or .npz"),
        ([ddpm, "--steps=2000"], "the run has only 1000"),
        (["--out_dir=nowhere"], "there is no valid checkpoint"),
    ]:
        refused(EXAMPLE, *options, cwd=tmp_path, message=message)
