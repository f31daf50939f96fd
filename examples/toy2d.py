"""
What optimal pairing gains in two dimensions: I-CFM and OT-CFM, 8 gaussians to moons and back.

    pip install -r requirements.txt -r bench/requirements.txt
    python examples/toy2d.py      # about 20 minutes on two cores; draws out/toy2d.png

Tong et al. 2023 (arXiv 2302.00482), section 3.2: if noise and data are paired within each batch, at
the least total squared distance, the flow is nearly straight. Here the flow of an MLP carries
10,000 fresh points, in one Euler step and with dopri5. Mean and deviation over five seeds:
    W2^2        exact squared 2-Wasserstein distance from where they arrive to points of the target
    curvature   E int |v|^2 dt / E |x(1) - x(0)|^2 - 1 along dopri5's paths: 0 if all are straight
                lines at constant speed
The setting is torchcfm's (sigma 0.1, 3 hidden layers of 64, SELU, AdamW 1e-3), except for the
cosine decay of the learning rate to 0, the batch size and the number of iterations.
"""
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ot
import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from cfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher, VelocityField
from configurator import configure
from sample import dopri5, euler, flow, rk4

# -----------------------------------------------------------------------------
seeds = 5
iterations = 10000
batch_size = 256
n_test = 10000
picture = "out/toy2d.png"
# -----------------------------------------------------------------------------
LIMITS = dict.fromkeys(["seeds", "iterations", "batch_size", "n_test"], (1, math.inf))
PAIRINGS = {"I-CFM": ConditionalFlowMatcher, "OT-CFM": ExactOptimalTransportConditionalFlowMatcher}


def moons(n):
    """Two half circles, smeared a bit along the diagonal, times 3, less 1: torchcfm's. (n, 2)"""
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 3 * (torch.stack([x, y], 1) + 0.2 * torch.rand(n, 1)) - 1


def gaussians(n):
    """Eight of them on a circle of radius 5, each of variance 0.1 ** 0.5: torchcfm's. (n, 2)"""
    angle = math.pi / 4 * torch.randint(8, (n,))
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1**0.25 * torch.randn(n, 2)


TASKS = {"8 gaussians to moons": (gaussians, moons), "moons to 8 gaussians": (moons, gaussians)}


class MLP(nn.Module):
    """A velocity (B, 2) at times t (B,) and points x (B, 2)."""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.SELU(),
            nn.Linear(width, width), nn.SELU(),
            nn.Linear(width, width), nn.SELU(),
            nn.Linear(width, 2))

    def forward(self, t, x, y=None):
        return self.net(torch.cat([x, t[:, None]], 1))


def wasserstein2(a, b):
    """The squared distance between two equally large point clouds, by exact optimal transport."""
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    return float(ot.emd2([], [], cost, numItermax=10**8))


def measure(job):
    """For one model: (W2^2 by one step, by dopri5, curvature, paths of 500 points (51, 500, 2))."""
    task, pairing, seed, iterations, batch_size, n_test = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    source, target = TASKS[task]
    mlp = MLP()
    field = VelocityField(mlp, PAIRINGS[pairing](sigma=0.1))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        loss = field.loss(target(batch_size), noise=source(batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        torch.manual_seed(10_000 + seed)
        start, real = source(n_test), target(n_test)
        v = flow(field)

        def along(t, state):                         # x, and beside it int |v|^2 dt so far
            dx = v(t, state[:, :2])
            return torch.cat([dx, dx.square().sum(1, keepdim=True)], 1)

        state = torch.cat([start, torch.zeros(n_test, 1)], 1)
        end, energy = dopri5(along, state, [0.0, 1.0], atol=1e-5, rtol=1e-5).split([2, 1], 1)
        curvature = energy.mean() / (end - start).square().sum(1).mean() - 1
        paths = [start[:500]]
        for i in range(50):
            paths.append(rk4(v, paths[-1], [i / 50, (i + 1) / 50]))
        one_step = wasserstein2(euler(v, start, [0.0, 1.0]), real)
        return one_step, wasserstein2(end, real), curvature.item(), torch.stack(paths)


def draw(paths, file):
    """A row for each task, a column for each pairing: start black, paths olive, end blue."""
    figure = Figure(figsize=(8, 8))
    axes = figure.subplots(len(TASKS), len(PAIRINGS))
    for row, task in zip(axes, TASKS):
        for axis, pairing in zip(row, PAIRINGS):
            x = paths[task, pairing]                 # (51, 500, 2)
            axis.plot(x[:, :, 0], x[:, :, 1], color="olive", alpha=0.25, linewidth=0.6)
            axis.scatter(*x[0].T, s=4, color="black", zorder=3)
            axis.scatter(*x[-1].T, s=4, color="royalblue", zorder=3)
            axis.set(title=f"{pairing}: {task}", aspect="equal")
            axis.axis("off")
    figure.tight_layout()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=70)


if __name__ == "__main__":
    configure(globals(), LIMITS)
    jobs = [(task, pairing, seed, iterations, batch_size, n_test)
            for seed in range(seeds) for pairing in PAIRINGS for task in TASKS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip([job[:3] for job in jobs], pool.map(measure, jobs)))
    draw({key[:2]: result[3] for key, result in results.items() if key[2] == 0}, picture)
    for task, (_, target) in TASKS.items():
        torch.manual_seed(99)
        floor = wasserstein2(target(n_test), target(n_test))
        print(f"\n{task} ({seeds} seeds, {iterations} iterations of {batch_size}); "
              f"W2^2 between two draws of the target: {floor:.3f}")
        for pairing in PAIRINGS:
            found = torch.tensor([results[task, pairing, seed][:3] for seed in range(seeds)])
            for name, values in zip(("1 step", "dopri5", "curvature"), found.T):
                print(f"  {pairing:7}{name:10}{values.mean():8.3f} "
                      f"+- {values.std(correction=seeds > 1):.3f}")
