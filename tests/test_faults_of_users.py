"""Faults that users met: networks, data sets and machines of other kinds than the scripts' own."""

import copy

import pytest
import torch
from torch import nn

import cfm
import ddpm
import unet
from sample import draw
from test_smoke import TINY, checkpoint, here

ONE = [*TINY, "--max_iters=2", "--eval_interval=2", "--out_dir=x"]


# ---- networks ----

class Other(nn.Module):
    """Called as the UNet is, with normalisation that keeps running averages."""

    def __init__(self, in_channels, num_classes, channels, **options):
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, t, x, y=None):
        return self.last(self.norm(self.first(x)).relu() + t.reshape(-1, 1, 1, 1))


class OfOneSize(Other):
    """As a transformer is, by its embedding of positions."""

    def __init__(self, **options):
        super().__init__(**options)
        self.position = nn.Parameter(torch.zeros(1, 8, 8))

    def forward(self, t, x, y=None):
        return super().forward(t, x + self.position, y)


class Labelled(Other):
    """It has no embedding of the lack of a label, and requires labels."""

    def __init__(self, num_classes, **options):
        super().__init__(num_classes=num_classes, **options)
        assert num_classes > 0
        self.label = nn.Embedding(num_classes, 1)

    def forward(self, t, x, y):
        return super().forward(t, x, y) + self.label(y)[:, :, None, None]


@pytest.mark.parametrize("method", [cfm, ddpm])
def test_buffers_follow_the_model(method):
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.BatchNorm2d(4))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for it in range(3):
        model(torch.randn(8, 1, 8, 8))
        with torch.no_grad():
            model[1].weight += 1
        method.update_average(ema, model, it)
    assert len(list(model.buffers())) == 5 and model[1].num_batches_tracked == 3
    for mean, latest in zip(ema.buffers(), model.buffers()):
        assert torch.equal(mean, latest)
    assert 1 < ema[1].weight.min() and ema[1].weight.max() < 4


@pytest.mark.parametrize("script", ["cfm", "ddpm"])
@pytest.mark.parametrize("network, options", [
    (Other, []), (OfOneSize, []), (OfOneSize, ["--image_size=0"]), (Labelled, ["--label_dropout=0"]),
])
def test_any_network_that_fits_the_data_trains_and_draws(script, network, options, tmp_path, monkeypatch):
    """Nothing is asked of it before the data are known. It is drawn with its own running averages."""
    monkeypatch.setattr(unet, "UNet", network)
    if "--image_size=0" in options:
        with pytest.raises(RuntimeError, match="must match the size"):     # 28 x 28, once it is trained
            here(script, *ONE, *options, cwd=tmp_path)
        return
    here(script, *ONE, *options, cwd=tmp_path)
    state = checkpoint(tmp_path / "x")
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(state["ema"][name], state["model"][name])
    here("sample", "--out_dir=x", "--n_samples=2", "--save=x.npz", cwd=tmp_path)


# ---- precision ----

class Plain(nn.Module):
    """A convolution, which takes x only in its own dtype, and an embedding of the time."""

    def __init__(self, integer=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.table = nn.Embedding(1000, 1) if integer else None
        self.times = []

    def forward(self, t, x, y=None):
        self.times.append(t)
        if self.table is not None:
            emb = self.table(t)
        else:
            emb = unet.time_embedding(t, 2).to(x.dtype).sum(1)
        return self.conv(x) + emb.reshape(-1, 1, 1, 1)


def methods(dtype=torch.float32):
    """A flow and three of DDPM's predictions, of the same weights in this dtype."""
    yield cfm.VelocityField(Plain().to(dtype), cfm.ConditionalFlowMatcher())
    for prediction in ddpm.PREDICTIONS:
        yield ddpm.DenoiseDiffusion(Plain().to(dtype), 50, prediction=prediction, unit_time=True)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_network_of_any_precision_trains_with_pictures_of_that(dtype):
    x = torch.rand(64, 1, 8, 8) * 2 - 1
    noise, u = torch.randn(64, 1, 8, 8), torch.rand(64)
    for method, reference in zip(methods(dtype), methods()):
        loss = method.loss(x.to(dtype), noise=noise.to(dtype), u=u)
        expected = reference.loss(x, noise=noise, u=u)
        least = torch.float64 if dtype == torch.float64 else torch.float32
        assert loss.dtype == least and method.model.times[0].dtype == least
        assert loss.item() == pytest.approx(expected.item(), rel=2e-2 if dtype in HALVES else 1e-5)
        loss.backward()
        assert method.model.conv.weight.grad.dtype == dtype


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "rk4", "ddim", "dpm++", "textbook"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_network_of_any_precision_draws_from_noise_of_that(sampler, dtype):
    noise, y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    for method, reference in zip(methods(dtype), methods()):
        torch.manual_seed(0)
        x = draw(method, noise.to(dtype), y, sampler, 8, guidance=2)
        torch.manual_seed(0)
        expected = draw(reference, noise, y, sampler, 8, guidance=2)
        least = torch.float64 if dtype == torch.float64 else torch.float32
        assert x.dtype == least and {t.dtype for t in method.model.times} == {least}
        if sampler != "textbook":                              # whose noise differs
            assert torch.allclose(x.float(), expected, atol=0.1 if dtype in HALVES else 1e-2)


def test_times_a_thousandth_apart_differ_in_bfloat16():
    x, t = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([0.9, 0.901])
    for method in methods(torch.bfloat16):
        a, b = method.velocity(t, x)
        assert not torch.allclose(a, b, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_a_network_that_embeds_whole_numbers_gets_whole_times(dtype):
    method = ddpm.DenoiseDiffusion(Plain(integer=True).to(dtype), 30)
    assert method.loss(torch.zeros(4, 1, 8, 8, dtype=dtype)).isfinite()
    assert method.sample(torch.randn(2, 1, 8, 8).to(dtype)).isfinite().all()
    assert {t.dtype for t in method.model.times} == {torch.long}


def test_a_thousand_steps_in_bfloat16_do_not_round_the_sum():
    """The noise of the last steps, a hundredth, is little more than what bfloat16 would round away."""
    def nothing(t, x, y):
        assert x.dtype == torch.bfloat16
        return torch.zeros_like(x)

    method = ddpm.DenoiseDiffusion(nothing, 1000)
    noise = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    x = method.sample(noise, randn=torch.zeros_like)
    assert x.item() == pytest.approx(method.alpha_bar[-1].item() ** -0.5, rel=1e-3)
