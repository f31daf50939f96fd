"""
How many evaluations does a good picture take? Each sampler with 1, 2, 4 ... 64 of them, judged.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/samplers.py                # of out/cfm and out/ddpm; draws out/samplers.png
    python bench/samplers.py --runs=out/cfm --n_samples=500     # of one run, and faster
    python bench/samplers.py --runs=out/cfm,out/cfm-1,out/ddpm,out/ddpm-1,out/reflow    # more seeds

Runs of one method should differ in their seed only. Their mean is shown, with the range. Runs of
examples/one_step.py --reflow are a group of their own.

All samplers start from the same noise. It prints the distance to the test set as a multiple of
the floor and the share recognised, by judge A of bench/quality.py. To choose a sampler or a number
of steps, add --against=train: the distance is then to the last 10,000 training digits. Fewer than
10,000 pictures have a larger distance, so compare only within the tables. An entry takes as many
steps as its evaluations of the model allow. For midpoint and rk4 with cfm.py that may be none. For
heun, and for every sampler with ddpm.py, it is at least the last step, straight to the data, which
takes one. The first step of a run with mean pictures has one evaluation fewer.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail
from core.machine import choose_machine
from quality import load_judge, score
from sample import SAMPLERS, STRAIGHT, draw, has_known_start, load_run

# -----------------------------------------------------------------------------
runs = "out/cfm,out/ddpm"    # folders with a ckpt.pt, of MNIST
samplers = "ddim,dpm++,heun"  # those that fit the run; "": all
n_samples = 2000
batch_size = 250
seed = 0
against = "test"             # the test digits; or train, the last 10,000 training digits
picture = "out/samplers.png"
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"n_samples": (2, math.inf), "batch_size": (1, math.inf), "seed": (0, 2**63 - 1),
          "against": ["test", "train"]}
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
CHOICES = [sampler for sampler in SAMPLERS if sampler != "dopri5"]     # it chooses its own steps
STYLES = {"cfm.py": "o-", "ddpm.py": "s--", "reflow": "D:"}            # of each group of runs
OF_A_STEP = {"midpoint": 2, "heun": 2, "rk4": 4}     # evaluations, if not one


def steps_for(sampler, evaluations, is_ddpm):
    """The most steps that this many evaluations of the model allow; 0 if there are none."""
    each = OF_A_STEP.get(sampler, 1)
    single = is_ddpm + (sampler == "heun")           # last steps, of one evaluation each
    if evaluations <= single:
        return evaluations
    return single + (evaluations - single) // each


def load(run):
    """(group, model, method, its samplers) of a run; calls fail() if it cannot be judged."""
    method, _, checkpoint = load_run(run, device=device)
    is_mnist = checkpoint["picture_shape"] == (1, 28, 28)
    if not is_mnist or checkpoint["model_args"]["num_classes"] != 10:
        fail(f"{run} is not a run of MNIST with labels, which the judge needs")
    if "steps" in checkpoint["limits"]:
        fail(f"{run} draws in one step only: there is nothing to compare")
    fitting = [sampler for sampler in samplers.split(",")
               if method.straight or sampler not in STRAIGHT]
    if not fitting:
        fail(f"--samplers={samplers}: none of them fits {run}")
    name = "reflow" if checkpoint["limits"] else f"{checkpoint['method']}.py"
    print(f"{run}: {name}, iteration {checkpoint['iteration']}, {', '.join(fitting)}", flush=True)
    return name, method.model, method, fitting


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
            saved = has_known_start(method)          # then the first evaluation is
            steps = steps_for(sampler, most + saved, is_ddpm)
            if not steps:
                continue
            x, y, evaluations = draw_digits(method, model, sampler, steps)
            distance, share = judge(x, y)
            found.setdefault(sampler, []).append((evaluations, distance, share))
            print(f"  {sampler}, {evaluations} evaluations: {distance:.2f}, {share:.1%}",
                  flush=True)
    return found


def over_runs(group, sampler):
    """Mean, min and max of a sampler's points, (points, 3) each; group: one curves() per run."""
    points = np.array([found[sampler] for found in group])
    return points.mean(0), points.min(0), points.max(0)


def print_table(name, group):
    """A group of runs: a row for each sampler, a column for each number of EVALUATIONS."""
    print(f"\n| {name}, runs: {len(group)} | " + " | ".join(map(str, EVALUATIONS)) + " |")
    print("|---" + len(EVALUATIONS) * "|---:" + "|")
    for sampler in group[0]:
        cells = [""] * (len(EVALUATIONS) - len(group[0][sampler]))
        for mean, least, most in zip(*over_runs(group, sampler)):
            spread = f" ({least[1]:.1f}-{most[1]:.1f})" if len(group) > 1 else ""
            cells.append(f"{mean[1]:.1f}{spread} {mean[2]:.0%}")
        print(f"| `{sampler}` | " + " | ".join(cells) + " |")


def plot(results, file):
    """Distance against evaluations. results is {name: group}; colours: samplers, styles: groups."""
    import matplotlib.pyplot as plt

    _, axis = plt.subplots(figsize=(8, 6), layout="tight", dpi=100)
    drawn = dict.fromkeys(sampler for group in results.values() for sampler in group[0])
    colours = {sampler: f"C{i}" for i, sampler in enumerate(drawn)}
    for name, group in results.items():
        for sampler in group[0]:
            mean, least, most = over_runs(group, sampler)
            x, colour = mean[:, 0], colours[sampler]
            axis.plot(x, mean[:, 1], STYLES[name], color=colour, markersize=5)
            if len(group) > 1:
                axis.fill_between(x, least[:, 1], most[:, 1], color=colour, alpha=0.2, linewidth=0)
    for sampler, colour in colours.items():          # the legend: colours first, then styles
        axis.plot([], [], colour, linewidth=5, label=sampler)
    for name, group in results.items():
        label = name
        label += f", mean and range of {len(group)} runs" if len(group) > 1 else ""
        axis.plot([], [], STYLES[name], color="black", markersize=5, label=label)
    axis.set(xlabel="evaluations of the model", ylabel=f"distance to the {against} digits / floor",
             xscale="log", yscale="log", xticks=EVALUATIONS, xticklabels=EVALUATIONS)
    axis.yaxis.set_major_locator(plt.LogLocator(subs=[1, 2, 5]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    plt.savefig(file)


if __name__ == "__main__":
    configure(globals(), LIMITS)
    samplers = samplers or ",".join(CHOICES)
    if not set(samplers.split(",")) <= set(CHOICES):
        fail(f"--samplers={samplers}: choose from {','.join(CHOICES)}")
    device, *_ = choose_machine(device)
    loaded = {run: load(run) for run in runs.split(",")}
    fitting = {name: own for name, _, _, own in loaded.values()}
    if any(own != fitting[name] for name, _, _, own in loaded.values()):
        fail(f"--runs={runs}: runs of one method must all have a straight path, or none")
    with explained():                                # fails before an hour of drawing
        import matplotlib

        matplotlib.use("Agg")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).touch()
    judge, references = load_judge(device=device)

    def judged(x, y):
        _, times, recognised, _ = score(judge, references[against], x, y)
        return times, recognised

    results = {}
    for run, (name, model, method, own) in loaded.items():
        print(f"{run}:", flush=True)
        found = curves(method, model, name == "ddpm.py", own, judged)
        results.setdefault(name, []).append(found)
    for name, group in results.items():
        print_table(name, group)
    plot(results, picture)
    print(f"drew {picture}")
