"""
How many evaluations does a good picture take? Each sampler with 1, 2, 4 ... 64 of them, judged.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/samplers.py                # of out/cfm and out/ddpm; draws assets/samplers.png
    python bench/samplers.py --runs=out/cfm --n_samples=500     # of one run, and faster

All samplers start from the same noise. Printed are the distance to the test set as a multiple of
the floor and the share recognised, see bench/quality.py: the distance is larger than that of 10,000
pictures, so compare within the table only. An entry is of as many steps as these evaluations of the
model suffice for. For midpoint and rk4 with cfm.py that may be none. For heun, and for every
sampler with ddpm.py, it is at least the last step, straight to the data, which takes one of them.
"""
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import TRAINING, Options, configure, explained, fail
from core.machine import choose_machine
from core.run import load_checkpoint
from quality import floors, frechet, load_judge, look
from sample import STRAIGHT, draw
from unet import UNet

# -----------------------------------------------------------------------------
runs = "out/cfm,out/ddpm"    # folders with a ckpt.pt, of MNIST
n_samples = 2000
batch_size = 250
seed = 0
data_dir = "data"            # of MNIST, and of the judge once trained
picture = "assets/samplers.png"
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"n_samples": (2, math.inf), "batch_size": (1, math.inf), "seed": (0, 2**63 - 1)}
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
OF_A_STEP = {"midpoint": 2, "heun": 2, "rk4": 4}     # evaluations, where it is not one


def steps_for(sampler, evaluations, is_ddpm):
    """The most steps that take no more than these evaluations of the model; 0 if there are none."""
    each = OF_A_STEP.get(sampler, 1)
    single = is_ddpm + (sampler == "heun")           # steps at the end that take one
    if evaluations <= single:
        return evaluations
    return single + (evaluations - single) // each


def draw_digits(method, model, sampler, steps):
    """(pictures uint8 (n_samples, 1, 28, 28), their labels, evaluations of the model for each)."""
    noise = torch.randn(n_samples, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n_samples) % 10
    batches = [(z.to(device), labels.to(device))
               for z, labels in zip(noise.split(batch_size), y.split(batch_size))]
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.cat([draw(method, *batch, sampler, steps) for batch in batches])
    hook.remove()
    x = (x * 127.5 + 127.5).round().clip(0, 255).byte()
    return x, y.to(device), len(calls) // len(batches)


def curves(method, model, is_ddpm, samplers, judge):
    """
    {sampler: [(evaluations, distance / floor, share recognised), ...]} of a method and its model.

    judge(pictures, labels) gives the last two.
    """
    found = {}
    for sampler in samplers:
        for most in EVALUATIONS:
            steps = steps_for(sampler, most, is_ddpm)
            if not steps:
                continue
            x, y, evaluations = draw_digits(method, model, sampler, steps)
            distance, share = judge(x, y)
            found.setdefault(sampler, []).append((evaluations, distance, share))
            print(f"  {sampler}, {evaluations} evaluations: {distance:.2f}, {share:.1%}",
                  flush=True)
    return found


def print_table(run, found):
    """What curves() found: a row for each sampler, a column for each number of EVALUATIONS."""
    print(f"\n| {run} | " + " | ".join(map(str, EVALUATIONS)) + " |")
    print("|---" + len(EVALUATIONS) * "|---:" + "|")
    for sampler, points in found.items():
        cells = [f"{distance:.1f} {share:.0%}" for _, distance, share in points]
        cells = [""] * (len(EVALUATIONS) - len(points)) + cells
        print(f"| `{sampler}` | " + " | ".join(cells) + " |")
    print(flush=True)


def plot(results, file):
    """A panel for each run: distance against evaluations, a line for each sampler."""
    import matplotlib.pyplot as plt

    size = 5 * len(results), 4
    _, axes = plt.subplots(1, len(results), figsize=size, sharey=True, squeeze=False)
    samplers = sorted(set().union(*results.values()))
    colours = {sampler: f"C{i}" for i, sampler in enumerate(samplers)}
    for axis, (run, found) in zip(axes[0], results.items()):
        for sampler, points in found.items():
            evaluations, distances, _ = zip(*points)
            axis.plot(evaluations, distances, colours[sampler], marker="o", label=sampler)
        axis.set(title=run, xlabel="evaluations of the model", xscale="log", yscale="log",
                 xticks=EVALUATIONS, xticklabels=EVALUATIONS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("distance / floor")
    plt.tight_layout()
    plt.savefig(file, dpi=80)


if __name__ == "__main__":
    configure(globals(), LIMITS)
    checkpoints = {run: load_checkpoint(Path(run, "ckpt.pt")) for run in runs.split(",")}
    for run, checkpoint in checkpoints.items():
        if checkpoint["method"] not in ("ddpm", "cfm"):
            fail(f"{run} is of another method: {checkpoint['method']}")
        is_mnist = checkpoint["picture_shape"] == (1, 28, 28)
        if not is_mnist or checkpoint["model_args"]["num_classes"] != 10:
            fail(f"{run} is no run of MNIST with labels, which the judge needs")
    with explained():                                # before an hour of drawing
        import matplotlib

        matplotlib.use("Agg")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).touch()
    device, *_ = choose_machine(device)
    with explained():
        judge, splits = load_judge(data_dir, device=device)
    (x_train, _), (x_test, _) = splits
    real, _ = look(judge, x_test)
    floor = np.mean(floors(judge, real, x_train))
    results = {}

    def judged(x, y):
        features, classes = look(judge, x)
        return frechet(features, real) / floor, (classes == y).double().mean().item()

    for run, checkpoint in checkpoints.items():
        script = importlib.import_module(checkpoint["method"])
        options = Options(vars(script), TRAINING | script.LIMITS)
        config = options.restored(checkpoint["config"])
        model = UNet(**checkpoint["model_args"]).eval()
        model = model.to(device, memory_format=torch.channels_last)
        model.load_state_dict(checkpoint["ema"])
        method = script.build(model, config, device)
        left_out = ["dopri5", "ancestral"] + (STRAIGHT if not method.straight else [])
        left_out += [] if config.get("spans") else ["meanflow"]
        samplers = [s for s in script.LIMITS["sampler"] if s not in left_out]
        print(f"{run}, iteration {checkpoint['iteration']}:", flush=True)
        results[run] = curves(method, model, checkpoint["method"] == "ddpm", samplers, judged)
        print_table(run, results[run])
    plot(results, picture)
    print(f"drew {picture}")
