"""
Mean velocities, learned from pictures alone: a digit in one evaluation of the model, no teacher.

    python examples/meanflow.py      # MNIST; grids by 1, 2 and 4 steps go to out/meanflow

A step from t to s needs the mean velocity over the span, not the velocity at its start. Geng et al.
2025 (arXiv 2505.13447) train a network u(x_t, t, s) to be that. As (s - t) u is the integral of the
velocity v from t to s, its derivative in t along the flow gives, with t = 0 for noise, their eq. 6:
    u = v + (s - t) du/dt.
The right side, with x1 - x0 in place of v, is the target of a regression. Here du/dt is a finite
difference along the model's own v = u(x_t, t, t) (arXiv 2512.02012); the papers differentiate.
"""
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from cfm import draw_times, expand_like
from configurator import configure, explained, say
from core.data import load_data
from core.machine import choose_machine
from core.muon import Muon
from core.save import to_bytes
from unet import UNet, time_embedding, zero_init

# -----------------------------------------------------------------------------
out_dir = "out/meanflow"
dataset = "mnist"
data_dir = "data"
iterations = 9380         # ten epochs of MNIST
batch_size = 64
learning_rate = 6e-3      # peak; it falls to 0
n_samples = 100           # to draw at the end, in 1, 2 and 4 steps, as .npz files and grids
seed = 1337
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"learning_rate": (0, math.inf), "seed": (0, 2**63 - 1),
          **dict.fromkeys(["iterations", "batch_size", "n_samples"], (1, math.inf))}


class SpanUNet(UNet):
    """
    A UNet whose t may be a span (B, 2), from t[:, 0] to t[:, 1]; t alone is the span (t, t).

    Raises ValueError for dropout: the loss compares calls, which would draw different masks.
    """

    def __init__(self, **args):
        super().__init__(**args)
        if args.get("dropout"):
            raise ValueError(f"mean velocities need a dropout of 0, not {args['dropout']}")
        emb = 4 * self.channels
        last = zero_init(torch.nn.Linear(emb, emb))
        first = torch.nn.Linear(self.channels, emb)
        self.span = torch.nn.Sequential(first, torch.nn.SiLU(), last)

    def embed(self, t, y=None):
        """(B, emb). Its frequencies are low: with the usual ones du/dt would be mostly noise."""
        t, s = t.unbind(1) if t.dim() == 2 else (t, t)
        of_t = time_embedding(t, self.channels, highest=30, max_period=300)
        of_span = time_embedding(s - t, self.channels, highest=30, max_period=300)
        emb = self.time(of_t) + self.span(of_span)
        return emb if self.label is None else emb + self.label(y + 1)


def draw_spans(n, k, device="cpu"):
    """Spans (n, 2) to train on, t <= s. After the first k, s = t."""
    t, other = draw_times(n, -0.4, 0.0, device), draw_times(k, -0.4, 0.0, device)
    start, end = torch.minimum(t[:k], other), torch.maximum(t[:k], other)
    # more of the spans that samplers take: those from the noise, or to the data
    start = torch.where(torch.rand_like(start) < 0.15, 0, start)
    end = torch.where(torch.rand_like(end) < 0.3, 1, end)
    return torch.stack([torch.cat([start, t[k:]]), torch.cat([end, t[k:]])], 1)


@torch.no_grad()
def mean_velocity_target(model, span, xt, v, u, y, step=0.05):
    """
    v + (s - t) du/dt (B, *dim), for spans (B, 2), points xt, velocities v, and u = model(span, xt).

    The difference quotient over [t, t + dt] is du/dt in the middle. A factor s - t would leave
    1/21 of the noise, if all data agree and step is 0.05; s - t - dt / 2 leaves half of that.
    """
    t, s = span.unbind(1)
    dt = (s - t).clamp(1e-4, step)                   # not 0, to divide by it
    own = model(t=torch.stack([t, t], 1), x=xt, y=y)
    ahead = model(t=torch.stack([t + dt, s], 1), x=xt + expand_like(dt, xt) * own, y=y)
    return v + expand_like((s - t - dt / 2) / dt, xt) * (ahead - u)


def squared_errors(model, x1, y, spans=0.35):
    """|u - target|^2 (B,) for x1 (B, *dim) and labels y (B,); spans is their share of the batch."""
    k = round(spans * len(x1))
    span, x0 = draw_spans(len(x1), k, x1.device), torch.randn_like(x1)
    xt = x0 + expand_like(span[:, 0], x1) * (x1 - x0)
    u, target = model(t=span, x=xt, y=y), x1 - x0
    target[:k] = mean_velocity_target(model, span[:k], xt[:k], target[:k], u[:k], y[:k])
    return (u - target).square().flatten(1).sum(1)


@torch.no_grad()
def sample(model, noise, y, steps=1):
    """Pictures from noise (B, *dim), one evaluation of the model a step (algorithm 2)."""
    x = noise
    for i in range(steps):
        span = torch.tensor([i / steps, (i + 1) / steps], device=x.device).expand(len(x), 2)
        x = x + model(t=span, x=x, y=y) / steps
    return x


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, _, _ = choose_machine(device)
    with explained(f"--dataset={dataset}: "):
        data = load_data(dataset, data_dir)
    data.to(device)
    pictures, labels = data.train
    torch.manual_seed(seed)
    model = SpanUNet(in_channels=pictures.shape[1], num_classes=len(data.classes))
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = Muon(model.parameters())
    noise = torch.randn(n_samples, *pictures.shape[1:], device=device)
    y = torch.arange(n_samples, device=device) // 10 % max(1, len(data.classes))

    for it in range(iterations):
        i = torch.randint(len(pictures), (batch_size,), device=device)
        errors = squared_errors(model, pictures[i].float() / 127.5 - 1, labels[i])
        (errors / (errors.detach() + 1e-3)).mean().backward()    # the paper's weight, with p = 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (it + 1) / 100) * (1 - it / iterations)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():                        # a decay of 0.999, less at first
            share = max(0.001, 9 / (it + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
        if (it + 1) % 100 == 0:
            say(f"iteration {it + 1} of {iterations}: error {errors.mean():.1f}")

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for steps in (1, 2, 4):
        x = torch.cat([sample(ema, *part, steps) for part in zip(noise.split(250), y.split(250))])
        save_image(x[:100] / 2 + 0.5, f"{out_dir}/{steps}.png", nrow=10)
        np.savez(f"{out_dir}/{steps}.npz", arr_0=to_bytes(x), arr_1=y.cpu())
