"""
One evaluation a picture: a network learns where a trained flow carries each noise.

    python examples/one_step.py                           # from assets/cfm, into out/one-step
    python sample.py --out_dir=out/one-step               # in one step
    python examples/one_step.py --init_from=out/cfm --reflow --out_dir=out/reflow
    python sample.py --out_dir=out/reflow --steps=2       # or more

A flow carries each noise x0 to one picture x1. From such pairs, and beginning with the teacher's
weights, a network learns the velocity of the straight line between them (Liu et al. 2022, arXiv
2209.03003, eq. 1):
    E |v(t, xt) - (x1 - x0)|^2,    xt = t x1 + (1 - t) x0.
At t = 0 the noise determines x1, so one step of Euler's method draws it: their distillation. With
--reflow t is any time. Curves of one flow never cross, so the lines between their ends rarely do,
and the new flow is nearly straight. New pairs keep replacing old ones, so none is learned by heart.
"""
import copy
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from cfm import draw_times, expand_like
from configurator import configure, explained, fail, say
from core.checkpoint import load_start, save_checkpoint
from core.machine import choose_machine
from core.muon import Muon
from sample import draw, load_run

# -----------------------------------------------------------------------------
init_from = "assets/cfm"  # the teacher, a run of cfm.py
out_dir = "out/one-step"
overwrite = False         # replace the run in out_dir
reflow = False            # learn all times, for two steps or more
teacher_steps = 6         # of dpm++ for each pair
pool = 10_000             # pairs in memory
fresh = 12                # new pairs an iteration, in place of the oldest
iterations = 8_000
batch_size = 64
learning_rate = 6e-3      # peak; it falls to 0
seed = 1337
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"learning_rate": (0, math.inf), "seed": (0, 2**63 - 1),
          **dict.fromkeys(["teacher_steps", "pool", "fresh", "iterations", "batch_size"],
                          (1, math.inf))}

# What sample.py may do with a run: limits of its options, as configure() has them.
ONE_STEP = {"steps": (0, 1), "sampler": ["dpm++", "ddim", "euler", "textbook"]}
REFLOW = {"eta": (0.0, 0.0)}    # fresh noise does not go with pairs


@torch.no_grad()
def draw_pairs(teacher, n, shape, num_classes, steps):
    """n noises x0 (n, *shape), the pictures x1 that the teacher makes of them, and their labels."""
    device = next(teacher.model.parameters()).device
    x0 = torch.randn(n, *shape, device=device)
    y = torch.randint(max(1, num_classes), (n,), device=device)
    y = y if num_classes else y - 1                  # -1: no label
    x1 = [draw(teacher, *part, "dpm++", steps) for part in zip(x0.split(250), y.split(250))]
    return x0, torch.cat(x1), y


def renewed(pairs, new):
    """The pairs (x0, x1, y), with new ones in place of the oldest."""
    return [torch.cat([old[len(added):], added]) for old, added in zip(pairs, new)]


def pair_loss(model, x0, x1, y, t):
    """
    The loss above, for pairs x0, x1 (B, *dim) of labels y, at times t (B,).

    Each error is divided by itself plus a constant, without gradient, so that a few large ones do
    not outweigh the rest (Geng et al. 2025, arXiv 2505.13447).
    """
    xt = x0 + expand_like(t, x0) * (x1 - x0)
    error = (model(t=t, x=xt, y=y) - (x1 - x0)).square().flatten(1).mean(1)
    return (error / (error.detach() + 0.01)).mean()


if __name__ == "__main__":
    configure(globals(), LIMITS)
    load_start(init_from, "cfm", out_dir, overwrite)     # says in one line what is wrong with it
    device, _, compile = choose_machine(device, compile="auto")      # on CUDA
    teacher, config, checkpoint = load_run(init_from, device=device)
    if "steps" in checkpoint["limits"]:
        fail(f"--init_from={init_from} draws in one step: give the flow that it learned from")
    about = checkpoint["picture_shape"], len(checkpoint["data"]["classes"]), teacher_steps
    torch.manual_seed(seed)
    with explained(f"--init_from={init_from}: "):    # dpm++ needs a straight path
        draw_pairs(teacher, 1, *about)
    model = copy.deepcopy(teacher.model).train().requires_grad_(True)
    ema = copy.deepcopy(teacher.model)
    net = torch.compile(model) if compile else model
    optimizer = Muon(model.parameters())
    config |= {"init_from": init_from, "out_dir": out_dir, "max_iters": iterations, "path": "icfm",
               "sigma": 0.0, "label_dropout": 0.0, "sampler": "dpm++",
               "sample_steps": 2 if reflow else 1}

    say(f"drawing {pool} pairs of noise and picture with {init_from}")
    pairs = draw_pairs(teacher, pool, *about)
    for it in range(iterations):
        if it % 50 == 0:                             # new pairs, in place of the oldest
            pairs = renewed(pairs, draw_pairs(teacher, min(pool, 50 * fresh), *about))
        i = torch.randint(pool, (batch_size,), device=device)
        t = torch.zeros(batch_size, device=device)
        if reflow:                                   # half stay 0, where all sampling begins
            t[::2] = draw_times(len(t[::2]), -0.4, 0.0, device)
        loss = pair_loss(net, *(part[i] for part in pairs), t)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (it + 1) / 100) * (1 - it / iterations)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():                        # a decay of 0.999, less at first
            share = max(0.001, 9 / (it + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
        if (it + 1) % 100 == 0 or it + 1 == iterations:
            say(f"iteration {it + 1} of {iterations}: loss {loss:.4f}")
        if (it + 1) % 1000 == 0 or it + 1 == iterations:
            save_checkpoint(Path(out_dir, "ckpt.pt"), **checkpoint | {
                "config": config, "iteration": it + 1, "limits": REFLOW if reflow else ONE_STEP,
                "model": {}, "optimizer": {}, "scaler": {}, "ema": ema.state_dict(),
                "means": None, "early": {}})         # its pictures depend on the noise
