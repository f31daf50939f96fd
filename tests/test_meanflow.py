"""Mean velocities over spans of time, against the known flow of a Gaussian."""

import copy

import pytest
import torch

import cfm
from cfm import ConditionalFlowMatcher, VelocityField, expand_like
from sample import check_sampler, draw, flow, meanflow
from test_smoke import TINY, checkpoint, flat, here, refused, sample
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


def field(model, spans=0.5):
    return VelocityField(model, ConditionalFlowMatcher(), spans=spans)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_step_of_exact_mean_velocities_is_the_whole_flow(steps):
    noise = torch.linspace(-2, 2, 9)[:, None]
    x = draw(field(exact), noise, sampler="meanflow", steps=steps)
    assert torch.allclose(x, M + S * noise, atol=1e-5)


@pytest.mark.parametrize("part", ["spans", "all"])
def test_the_exact_mean_velocity_has_the_smallest_loss(part):
    """Also among models wrong on spans only, where the identity v = u - (s - t) du/dt decides."""
    torch.manual_seed(0)
    x1 = M + S * torch.randn(20_000, 1)
    losses = []
    for factor in (0.9, 1.0, 1.1):

        def model(t, x, y, factor=factor):
            span = t[:, :1] < t[:, 1:] if t.dim() == 2 else torch.zeros(len(t), 1)
            wrong = span.float() if part == "spans" else torch.ones_like(x)
            return exact(t, x) * (1 + (factor - 1) * wrong)

        torch.manual_seed(1)
        losses.append(field(model).loss(x1).item())
    assert losses[1] < min(losses[0], losses[2]) - 1e-4


def test_the_target_takes_no_gradient():
    """The loss has a gradient only through u(x_t, t, s) itself."""
    calls, x1 = [], torch.randn(8, 1, 8, 8)
    model = UNet(channels=8, spans=True)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)

    def recorded(t, x, y):
        out = model(t=t, x=x, y=y)
        calls.append((len(t), out.requires_grad))
        return out

    torch.manual_seed(3)
    field(recorded).loss(x1).backward()
    assert calls == [(8, True), (4, False), (4, False)]
    assert model.conv_out.weight.grad.abs().max() > 0


def test_without_spans_nothing_is_computed_or_different():
    calls = []

    def model(t, x, y):
        calls.append(t.shape)
        return torch.zeros_like(x)

    x1 = torch.randn(8, 1, 4, 4)
    torch.manual_seed(2)
    loss = field(model, spans=0.0).loss(x1)
    torch.manual_seed(2)
    assert loss == VelocityField(model, ConditionalFlowMatcher()).loss(x1)
    assert calls == [(8,), (8,)]
    assert not any("span" in name for name in UNet().state_dict())


def test_evaluation_is_of_the_velocity_alone():
    """If times are given, as in evaluate(), the loss is plain flow matching's."""
    x1, x0, u = torch.randn(3, 6, 1, 4, 4)[0], torch.randn(6, 1, 4, 4), torch.rand(6)
    given = field(exact).loss(x1, noise=x0, u=u)
    assert given == field(exact, spans=0.0).loss(x1, noise=x0, u=u)


def test_spans_go_forward_and_the_rest_are_times():
    torch.manual_seed(0)
    t, s = VelocityField(None, ConditionalFlowMatcher(), -0.4, 0.0).draw_spans(10_000, 3000)
    assert (s >= t).all() and (s[3000:] == t[3000:]).all() and (s[:3000] > t[:3000]).all()
    assert (t[:3000] == 0).float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (s[:3000] == 1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.logit(t[3000:]).mean().item() == pytest.approx(-0.4, abs=0.05)


def test_the_model_takes_times_and_spans_and_is_smooth():
    torch.manual_seed(0)
    model = UNet(channels=8, spans=True).eval()
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


def test_guidance_and_labels_go_with_spans():
    seen = []

    def model(t, x, y):
        seen.append((t.shape, y.tolist()))
        return torch.zeros_like(x)

    v = flow(field(model), torch.tensor([3, 4]), guidance=2.0)
    meanflow(v, torch.randn(2, 1, 4, 4), [0.0, 0.5, 1.0])
    assert seen == [((4, 2), [3, 4, -1, -1])] * 2


def test_meanflow_needs_a_model_of_mean_velocities(tmp_path):
    with pytest.raises(ValueError, match="needs a model of mean velocities"):
        check_sampler("meanflow", field(exact, spans=0.0))
    refused("cfm", *TINY, "--sampler=meanflow", cwd=tmp_path, message="train one with --spans")


def test_a_run_learns_resumes_exactly_and_draws_by_any_sampler(tmp_path):
    options = [*TINY, "--spans=0.5", "--sampler=meanflow", "--sample_steps=1"]
    here("cfm", *options, "--max_iters=40", "--out_dir=a", "--learning_rate=5e-3", cwd=tmp_path)
    rows = (tmp_path / "a" / "log.csv").read_text().splitlines()[1:]
    held_out = [float(row.split(",")[4]) for row in rows if row.split(",")[4]]
    assert held_out[1] < held_out[0]
    for more in ([], ["--steps=3"], ["--sampler=dpm++", "--steps=2"], ["--task=reconstruct"]):
        sample("--out_dir=a", "--n_samples=4", *more, cwd=tmp_path)
    straight = [*options, "--decay_lr=false", "--max_iters=20", "--eval_interval=10"]
    here("cfm", *straight, "--out_dir=b", cwd=tmp_path)
    here("cfm", *straight, "--max_iters=10", "--out_dir=c", cwd=tmp_path)
    here("cfm", "--init_from=resume", "--max_iters=20", "--out_dir=c", cwd=tmp_path)
    for one, other in zip(flat(checkpoint(tmp_path / "b")), flat(checkpoint(tmp_path / "c"))):
        assert torch.equal(one, other)
    resumed = ["--init_from=resume", "--out_dir=c"]
    refused("cfm", *resumed, "--spans=0.2", cwd=tmp_path, message="for good")


@pytest.mark.parametrize("paths", ["icfm", "target", "vp", "sb"])
def test_every_path_can_have_spans(paths):
    torch.manual_seed(0)
    config = vars(cfm) | {"path": paths, "sigma": 0.3, "spans": 0.5}
    model = UNet(channels=8, spans=True)
    method = cfm.build(model, config)
    loss = method.loss(torch.randn(6, 1, 8, 8), torch.tensor([-1] * 6))
    loss.backward()
    assert loss.isfinite() and copy.deepcopy(method).spans == 0.5
