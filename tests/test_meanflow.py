"""examples/meanflow.py: mean velocities over spans of time, against the known flow of a Gaussian."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import meanflow
from cfm import expand_like
from meanflow import SpanUNet, draw_spans, mean_velocity_target, squared_errors
from helpers import here
from unet import UNet

M, S = 0.3, 0.5  # the data: N(M, S^2); the noise: N(0, 1)


def width(t):
    return (t**2 * S**2 + (1 - t) ** 2).sqrt()


def exact(t, x, y=None):
    """
    The flow takes x at t to s M + width(s) / width(t) (x - t M) at s. Returns its mean velocity in
    between, or for t (B,) the velocity itself.
    """
    t, s = t.unbind(1) if t.dim() == 2 else (t, t)
    t, s = (expand_like(v.double(), x) for v in (t, s))
    z = x.double() - t * M
    now = M + (t * S**2 - (1 - t)) / width(t) ** 2 * z
    over = (M * (s - t) + (width(s) / width(t) - 1) * z) / (s - t)
    return torch.where(s > t, over, now).float()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_step_of_exact_mean_velocities_is_the_whole_flow(steps):
    noise = torch.linspace(-2, 2, 9)[:, None]
    x = meanflow.sample(exact, noise, None, steps)
    assert torch.allclose(x, M + S * noise, atol=1e-5)


@pytest.mark.parametrize("part", ["spans", "all"])
def test_the_exact_mean_velocity_has_the_smallest_error(part):
    """Also among models wrong on spans only, where the identity v = u - (s - t) du/dt decides."""
    torch.manual_seed(0)
    x1 = M + S * torch.randn(20_000, 1)
    errors = []
    for factor in (0.9, 1.0, 1.1):

        def model(t, x, y, factor=factor):
            wrong = (t[:, :1] < t[:, 1:]).float() if part == "spans" else torch.ones_like(x)
            return exact(t, x) * (1 + (factor - 1) * wrong)

        torch.manual_seed(1)
        errors.append(squared_errors(model, x1, torch.zeros(len(x1)), spans=0.5).mean().item())
    assert errors[1] < min(errors[0], errors[2]) - 1e-4


@pytest.mark.parametrize("deviation, kept", [(0.001, 0.0244), (0.2, 0.2004)])
def test_the_fixed_point_of_the_target_has_nearly_the_deviation_of_the_data(deviation, kept):
    """
    Of data N(0, deviation^2), from which the mean velocity is a(t) x. It is the fixed point of its
    own target, found from t = 1 backwards, as the target is linear in u. With s - t in place of
    s - t - dt/2, 0.048 and 0.224 would be left of the deviation of the noise.
    """

    def velocity(t):
        return (t * deviation**2 - (1 - t)) / (t**2 * deviation**2 + (1 - t) ** 2)

    x = torch.ones(1, 1, dtype=torch.float64)
    a = velocity(torch.ones_like(x))
    for t in torch.arange(19, -1, -1, dtype=torch.float64) / 20:

        def model(t, x, y, ahead=a):
            start, end = t.split(1, 1)
            return torch.where(start == end, velocity(start), ahead) * x

        span = torch.stack([t, torch.ones_like(t)])[None]
        v = velocity(t) * x
        zero, one = (mean_velocity_target(model, span, x, v, u * x, None) for u in (0, 1))
        a = zero / (1 - (one - zero))
    assert (1 + a).item() == pytest.approx(kept, abs=1e-4)


def test_the_target_takes_no_gradient_and_each_picture_counts_by_the_sum_of_its_pixels():
    """The errors have a gradient only through u(x_t, t, s) itself."""
    calls, x1 = [], torch.randn(8, 1, 8, 8)
    model = SpanUNet(channels=8)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)

    def recorded(t, x, y):
        out = model(t=t, x=x, y=y)
        calls.append((len(t), out.requires_grad))
        return out

    torch.manual_seed(3)
    squared_errors(recorded, x1, torch.zeros(8), spans=0.5).mean().backward()
    assert calls == [(8, True), (4, False), (4, False)]
    assert model.conv_out.weight.grad.abs().max() > 0
    black, y = torch.zeros(500, 1, 8, 8), torch.zeros(500)
    errors = squared_errors(lambda t, x, y: torch.zeros_like(x), black, y, spans=0.0)
    assert errors.mean().item() == pytest.approx(64, rel=0.05)  # |x1 - x0|^2 of 64 pixels


def test_spans_go_forward_and_the_rest_are_times():
    torch.manual_seed(0)
    t, s = draw_spans(10_000, 3000).unbind(1)
    assert (s >= t).all() and (s[3000:] == t[3000:]).all() and (s[:3000] > t[:3000]).all()
    assert (t[:3000] == 0).float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (s[:3000] == 1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.logit(t[3000:]).mean().item() == pytest.approx(-0.4, abs=0.05)


def test_the_network_takes_times_and_spans_and_is_smooth():
    torch.manual_seed(0)
    model = SpanUNet(channels=8).eval()
    for p in model.parameters():
        if p.abs().max() == 0:  # otherwise it predicts 0 and ignores spans at first
            torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5) * 0.9
    at_once = model(t=torch.stack([t, t], 1), x=x)
    assert torch.equal(model(t=t, x=x), at_once)
    assert not torch.allclose(model(t=torch.stack([t, t + 0.1], 1), x=x), at_once, atol=1e-4)
    usual = UNet(channels=8).eval()
    usual.load_state_dict({k: v for k, v in model.state_dict().items() if "span" not in k})
    rough, smooth = ((m(t=t + 0.01, x=x) - m(t=t, x=x)).norm() for m in (usual, model))
    assert smooth < 0.3 * rough
    with pytest.raises(ValueError, match="need a dropout of 0, not 0.1"):
        SpanUNet(channels=8, dropout=0.1)


def test_the_page_learns_and_draws_grids_by_its_own_command(tmp_path):
    """From another folder. The error falls, and pictures of 1, 2 and 4 steps differ."""
    tiny = ["--dataset=synthetic", "--iterations=100", "--batch_size=8", "--n_samples=12"]
    printed = here("examples/meanflow", *tiny, "--device=cpu", cwd=tmp_path)
    assert float(printed.split()[-1]) < 800  # |x1 - x0|^2, with which it begins, is about 1300
    drawn = [np.load(tmp_path / "out" / "meanflow" / f"{steps}.npz") for steps in (1, 2, 4)]
    assert all(file["arr_0"].shape == (12, 28, 28, 1) for file in drawn)
    assert drawn[0]["arr_1"].tolist() == [0] * 10 + [1] * 2
    assert (drawn[0]["arr_0"] != drawn[1]["arr_0"]).any()
    assert (tmp_path / "out" / "meanflow" / "4.png").read_bytes()[1:4] == b"PNG"
