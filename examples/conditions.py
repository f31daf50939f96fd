"""
Numbers as conditions: digits as bold and as slanted as asked for, learned from a run of cfm.py.

    python examples/conditions.py --init_from=assets/cfm     # a grid, out/conditions.png

A condition enters the UNet as a vector that is added to the embedding of time and class. All that a
new one needs is a layer from it to such a vector, see ConditionUNet. The layer starts at zero, so
training starts from the run's pictures and takes a sixth of its iterations. Any vector can take the
place of the numbers: an embedding of a text, or of another picture. Numbers are hidden now and then
in training, so that they can be left out when drawing, and guidance works as it does for classes.
"""
import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn import Linear, Sequential, SiLU
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from cfm import ConditionalFlowMatcher, VelocityField
from configurator import configure, explained, fail, say
from core.data import load_data
from core.machine import choose_machine
from core.muon import Muon
from core.save import claim
from sample import dpm_solver, flow, load_run
from unet import UNet, zero_init

# -----------------------------------------------------------------------------
init_from = "assets/cfm"  # a run of cfm.py on pictures of one colour
dataset = "mnist"
data_dir = "data"
iterations = 1500
batch_size = 64
learning_rate = 3e-3      # peak, half of cfm.py's; it falls to 0
hidden = 0.1              # probability that a number, or the class, is hidden in training
steps = 10                # of dpm++
guidance = 1.0
save = "out/conditions.png"  # a row for each class: bolder, then more slanted, from the same noise
n_samples = 1000          # to measure, of random classes and numbers
seed = 1337
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"learning_rate": (0, math.inf), "hidden": (0, 1), "guidance": (0, math.inf),
          "seed": (0, 2**63 - 1),
          **dict.fromkeys(["iterations", "batch_size", "steps", "n_samples"], (1, math.inf))}


class ConditionUNet(UNet):
    """A UNet whose y is (B, 1 + n): a class, then n numbers in [0, 1]; -1 for what is unknown."""

    def __init__(self, n, **args):
        super().__init__(**args)
        emb = 4 * self.channels
        self.numbers = Sequential(Linear(2 * n, emb), SiLU(), zero_init(Linear(emb, emb)))

    def embed(self, t, y):
        known = (y[:, 1:] >= 0).float()
        numbers = torch.cat([known, known * y[:, 1:]], 1)            # (B, 2n)
        return super().embed(t, y[:, 0].long()) + self.numbers(numbers)


def boldness(x):
    """The mean width of strokes in pixels (B,), of x (B, 1, H, W) in [0, 1], 1 being ink."""
    x = F.pad(x, (1, 1, 1, 1))
    across, down = x.diff(dim=3)[:, :, 1:], x.diff(dim=2)[:, :, :, 1:]
    outline = (across.square() + down.square()).sqrt().sum((1, 2, 3))    # twice a stroke's length
    return 2 * x.sum((1, 2, 3)) / outline.clamp(min=1)


def slant(x):
    """How far strokes lean to the right in pixels a row (B,), of x (B, 1, H, W) in [0, 1]."""
    rows, columns = (torch.arange(n, device=x.device).float() for n in x.shape[2:])
    ink = x.sum(1) / x.sum((1, 2, 3)).clamp(min=1)[:, None, None]    # (B, H, W), of sum 1
    down = rows - (ink.sum(2) @ rows)[:, None]                       # (B, H), from the centre
    right = columns - (ink.sum(1) @ columns)[:, None]                # (B, W)
    both = (ink * down[:, :, None] * right[:, None]).sum((1, 2))
    return -both / (ink.sum(2) * down.square()).sum(1).clamp(min=1e-3)    # least squares


def ranks(values, kinds, among, among_kinds):
    """The share of among (N, n) of the same class that is below each of values (B, n)."""
    shares = torch.empty_like(values)
    for k in kinds.unique():
        same = among[among_kinds == k].T.contiguous().sort().values  # (n, N of this class)
        below = torch.searchsorted(same, values[kinds == k].T.contiguous())
        shares[kinds == k] = below.T / same.shape[1]
    return shares


def look(x):
    """Boldness and slant (B, 2) of pictures x (B, 1, H, W) in [-1, 1]."""
    ink = x.clamp(-1, 1) / 2 + 0.5
    return torch.stack([boldness(ink), slant(ink)], 1)


@torch.no_grad()
def draw(field, noise, y, steps=10, guidance=1.0):
    """Pictures from noise (N, C, H, W) for conditions y (N, 1 + n), by DPM-Solver++."""
    return torch.cat([dpm_solver(flow(field, part, guidance), z, field.times(steps))
                      for z, part in zip(noise.split(100), y.split(100))])


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, *_ = choose_machine(device)
    method, config, checkpoint = load_run(init_from, device=device)
    shape, classes = checkpoint["picture_shape"], checkpoint["data"]["classes"]
    plain = checkpoint["method"] == "cfm" and method.renewable and not checkpoint["limits"]
    if not (plain and classes and shape[0] == 1):
        fail(f"--init_from={init_from} must be a run of cfm.py, with --path=icfm and --sigma=0, "
             "on pictures of one colour, with classes")
    with explained(f"--dataset={dataset}: "):
        data = load_data(dataset, data_dir)
    if data.train[0].shape[1:] != shape or data.classes != classes:
        fail(f"--dataset={dataset} is not the run's: other classes, or another size")
    claim(Path(save), [".png"], or_folder=False)
    pictures, labels = (part.to(device) for part in data.train)
    measured = torch.cat([look(x.float() / 127.5 - 1) for x in pictures.split(1000)])    # (N, 2)
    y = torch.cat([labels[:, None], ranks(measured, labels, measured, labels)], 1)       # (N, 3)

    torch.manual_seed(seed)
    model = ConditionUNet(2, **checkpoint["model_args"]).to(device)
    model.load_state_dict(method.model.state_dict(), strict=False)    # all but the new layers
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = Muon(model.parameters())
    field = VelocityField(model, ConditionalFlowMatcher(), config["t_mean"], config["t_uniform"])
    for it in range(iterations):
        i = torch.randint(len(pictures), (batch_size,), device=device)
        told = torch.where(torch.rand(batch_size, 3, device=device) < hidden, -1, y[i])
        loss = field.loss(pictures[i].float() / 127.5 - 1, told)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (it + 1) / 100) * (1 - it / iterations)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():                        # a decay of 0.999, less at first
            share = max(0.001, 9 / (it + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
        if (it + 1) % 100 == 0:
            say(f"iteration {it + 1} of {iterations}: loss {loss:.4f}")

    field, rows = VelocityField(ema, ConditionalFlowMatcher()), len(classes)
    y = torch.cat([torch.arange(n_samples)[:, None] % rows, torch.rand(n_samples, 2)], 1)
    y, noise = y.to(device), torch.randn(n_samples, *shape).to(device)
    found = look(draw(field, noise, y, steps, guidance))
    off = (ranks(found, y[:, 0], measured, labels) - y[:, 1:]).abs().mean(0)
    say(f"of ranks from 0 to 1, boldness is off by {off[0]:.3f} on average, slant by {off[1]:.3f}; "
        "by chance it would be 0.333")

    sweep, middle = torch.linspace(0.05, 0.95, 7), torch.full((7,), 0.5)
    strip = torch.cat([torch.stack([sweep, middle], 1), torch.stack([middle, sweep], 1)])
    y = torch.cat([torch.arange(rows).repeat_interleave(14)[:, None], strip.repeat(rows, 1)], 1)
    noise = torch.randn(rows, *shape).repeat_interleave(14, 0)
    x = draw(field, noise.to(device), y.to(device), steps, guidance)
    save_image(x / 2 + 0.5, Path(save), nrow=14)
    say(f"{rows} x 14 pictures: {save}")
