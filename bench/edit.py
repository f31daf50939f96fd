"""
How good are edits of digits? The frozen judge A says, of many whose right half was hidden, or which
were averaged down to 7 x 7 pixels, and then restored without their labels.

    python bench/edit.py                                 # all rows of 10,000 test digits: an hour
    python bench/edit.py --n=500 --against=train         # for choices: training digits held back
    python bench/edit.py --rows=half,seven               # only these; see ROWS at the end

A row gives
    share        taken for the class of the original
    x floor      the squared Frechet distance to the digits of the split, in floors: see quality.py.
                 With fewer than 10,000 it comes out larger: compare it with that of --rows=real
    seam         the mean squared jump across the seam, from column 13 to 14, of values in [-1, 1]
    consistent   the share of known values that come back: within one grey level, as averages or
                 pixels of the picture as it is saved
"""
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import enlarge
import inpaint
from configurator import configure, fail
from core.machine import choose_machine
from quality import load_digits, load_judge, score
from sample import ddim, draw, flow, load_run

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"
data_dir = "data"
against = "test"             # the test digits; or train, the last 10,000 training digits
n = 10_000                   # of these, evenly spread
rows = ""                    # which, in order; "": all
batch_size = 250
seed = 0
device = "cpu"
# -----------------------------------------------------------------------------
LIMITS = {"against": ["test", "train"], "n": (2, 10_000), "batch_size": (1, math.inf),
          "seed": (0, 2**63 - 1)}
keep = torch.zeros(1, 1, 28, 28, dtype=torch.bool)
keep[..., :14] = True


@torch.no_grad()
def repaint(method, project, known, y, steps=5, resamplings=4):
    """
    RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1) along the straight path.

    A step is DDPM's: ddim with eta = 1. Known pixels come from the picture, with noise of the time
    at which the step ends. Noise then takes the result back a step, to be made again, and so on.
    """
    taus, z, v = method.times(steps), torch.randn_like(known), flow(method, y)
    for t, s in zip(taus, taus[1:]):
        for left in reversed(range(resamplings)):
            x = ddim(v, z, [t, s], eta=1.0)
            x = torch.where(keep, s * known + (1 - s) * torch.randn_like(x), x)
            if left:
                var = (1 - t) ** 2 - (t / s * (1 - s)) ** 2          # of q(z_t | z_s)
                z = t / s * x + math.sqrt(var) * torch.randn_like(x)
        z = x
    return z


# ---- rows: functions of pictures x in [-1, 1] and their labels y, which only controls may see ----

def half(x, y, told=True, fill=inpaint.restore):
    """inpaint.py, the right half hidden; without a class if not told; or another way to fill in."""
    known = torch.where(keep, x, 0)

    def project(x):
        return torch.where(keep, known, x)

    y = None
    if told:
        y = inpaint.weigh_classes(method, project, known, 10).multinomial(1).squeeze(1)
    return fill(method, project, known, y)


def seven(x, y, told=True):
    """enlarge.py, from 7 x 7 pixels of whole grey levels; without a class if not told."""
    small = F.avg_pool2d(x * 127.5 + 127.5, 4).round() / 127.5 - 1

    def project(x):
        return enlarge.project_means(x, small, 4)

    start, y = F.interpolate(small, scale_factor=4), None
    if told:
        y = enlarge.weigh_classes(method, project, start, 10).multinomial(1).squeeze(1)
    return enlarge.restore(method, project, start, y)


def paste(x, y):
    return torch.where(keep, x, draw(method, torch.randn_like(x), y))


def bicubic(x, y):
    small = F.avg_pool2d(x, 4)
    return F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)


ROWS = {
    "real": lambda x, y: x,
    "half": half,
    "half_repaint": lambda x, y: half(x, y, fill=repaint),
    "half_untold": lambda x, y: half(x, y, told=False),
    "half_pasted": lambda x, y: paste(x, torch.randint(10, y.shape)),
    "half_pasted_class": paste,
    "seven": seven,
    "seven_untold": lambda x, y: seven(x, y, told=False),
    "seven_bicubic": bicubic,
}


if __name__ == "__main__":
    configure(globals(), LIMITS)
    wanted = [name for name in rows.split(",") if name] or list(ROWS)
    if unknown := set(wanted) - set(ROWS):
        fail(f"--rows: {min(unknown)} is not one of {', '.join(ROWS)}")
    choose_machine(device)
    method, *_ = load_run(out_dir)
    train_split, test_split = load_digits(data_dir)
    x, y = test_split if against == "test" else [part[-10_000:] for part in train_split]
    network, references = load_judge()
    x, y = (part[::10_000 // n][:n] for part in (x, y))
    print(f"{n} {against} digits, seed {seed}, {out_dir}")
    print(f"{'':20} {'share':>7} {'x floor':>8} {'seam':>6} {'consistent':>10} {'CPU minutes':>11}")
    for name in wanted:
        torch.manual_seed(seed)
        start, parts = time.process_time(), []
        for pictures, labels in zip(x.split(batch_size), y.split(batch_size)):
            drawn = ROWS[name](pictures.float() / 127.5 - 1, labels)
            parts.append((drawn * 127.5 + 127.5).round().clamp(0, 255).byte())
        minutes = (time.process_time() - start) / 60
        drawn = torch.cat(parts)
        _, times, share, _ = score(network, references[against], drawn, y)
        values = drawn.float() / 127.5 - 1
        seam = (values[..., 14] - values[..., 13]).square().mean().item()
        if name.startswith("seven"):
            gap = F.avg_pool2d(drawn.float(), 4) - F.avg_pool2d(x.float(), 4).round()
        else:
            gap = (drawn.float() - x)[..., :14]
        kept = (gap.abs() <= 1).double().mean().item()
        print(f"{name:20} {share:7.2%} {times:8.2f} {seam:6.3f} {kept:10.2%} {minutes:11.1f}",
              flush=True)
