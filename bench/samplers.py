"""
How many evaluations of the model does a good picture take? Each sampler with 1, 2, 4 ... 64 of them, judged.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/samplers.py                              # of out/cfm and out/ddpm; draws assets/samplers.png
    python bench/samplers.py --runs=out/cfm --n_samples=500     # of one run, and faster

All samplers start from the same noise. Printed are the distance to the test set as a multiple of the floor
and the share recognised, see bench/quality.py: the distance is larger than that of 10,000 pictures, so
compare within the table only. An entry is of as many steps as these evaluations suffice for: of cfm.py that
may be none; of ddpm.py it is at least the last one, straight to the data, which takes one.
"""
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import choose_machine, configure, explained, fail, load_checkpoint
from quality import floors, frechet, load_judge, look
from sample import TABLEAUS, draw
from unet import UNet

# ------------------------------------------------------------------------------------------------------------
runs = "out/cfm,out/ddpm"    # folders with a ckpt.pt, of MNIST
n_samples = 2000
batch_size = 250
seed = 0
data_dir = "data"            # of MNIST, and of the judge once trained
picture = "assets/samplers.png"
device = "auto"
# ------------------------------------------------------------------------------------------------------------
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)


def steps_for(sampler, evaluations, is_ddpm):
    """As many steps as these evaluations of the model are enough for; ddpm's last step always takes one."""
    stages = len(TABLEAUS[sampler][1]) if sampler in TABLEAUS else 1
    return (evaluations - 1) // stages + 1 if is_ddpm else evaluations // stages


def curves(method, is_ddpm, samplers, judge):
    """{sampler: [(evaluations, distance / floor, share recognised), ...]}, as judge tells the last two."""
    noise = torch.randn(n_samples, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).to(device)
    y, found = torch.arange(n_samples, device=device) % 10, {}
    for sampler in samplers:
        for evaluations in EVALUATIONS:
            if steps := steps_for(sampler, evaluations, is_ddpm):
                parts = [draw(method, n, labels, steps, sampler) for n, labels in
                         zip(noise.split(batch_size), y.split(batch_size))]
                x = torch.cat([(x * 127.5 + 127.5).round().clip(0, 255).byte() for x, _ in parts])
                found.setdefault(sampler, []).append((parts[0][1], *judge(x, y)))
                print("  {}, {} evaluations: {:.2f}, {:.1%}".format(sampler, *found[sampler][-1]), flush=True)
    return found


def plot(results, file):
    """A panel for each run: distance against evaluations, a line for each sampler."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), sharey=True, squeeze=False)
    colours = {sampler: f"C{i}" for i, sampler in enumerate(sorted(set().union(*results.values())))}
    for axis, (run, found) in zip(axes[0], results.items()):
        for sampler, points in found.items():
            axis.plot(*list(zip(*points))[:2], colours[sampler], marker="o", label=sampler)
        axis.set(title=run, xlabel="evaluations of the model", xscale="log", yscale="log", xticks=EVALUATIONS,
                 xticklabels=EVALUATIONS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("distance / floor")
    plt.tight_layout()
    plt.savefig(file, dpi=80)


if __name__ == "__main__":
    configure(globals(), {"n_samples": (2, math.inf), "batch_size": (1, math.inf), "seed": (0, 2**63 - 1)})
    checkpoints = {run: load_checkpoint(Path(run, "ckpt.pt")) for run in runs.split(",")}
    for run, checkpoint in checkpoints.items():
        if checkpoint["picture_shape"] != (1, 28, 28) or checkpoint["model_args"]["num_classes"] != 10:
            fail(f"{run} is no run of MNIST with labels, which the judge needs")
    with explained():                                                         # before an hour of drawing
        import matplotlib

        matplotlib.use("Agg")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).touch()
    device, *_ = choose_machine(device)
    with explained():
        judge, splits = load_judge(data_dir, device=device)
    real, _ = look(judge, splits[1][0])
    floor, results = np.mean(floors(judge, real, splits[0][0])), {}

    def judged(x, y):
        features, classes = look(judge, x)
        return frechet(features, real) / floor, (classes == y).double().mean().item()

    for run, checkpoint in checkpoints.items():
        script, is_ddpm = importlib.import_module(checkpoint["method"]), checkpoint["method"] == "ddpm"
        config = vars(script) | checkpoint["config"]
        model = UNet(**checkpoint["model_args"]).to(device, memory_format=torch.channels_last).eval()
        model.load_state_dict(checkpoint["ema"])
        samplers = [s for s in script.LIMITS["sampler"] if s not in ("dopri5", "ancestral")]
        print(f"{run}, iteration {checkpoint['iteration']}:", flush=True)
        results[run] = curves(script.build(model, config, device), is_ddpm, samplers, judged)
        print(f"\n| {run} | " + " | ".join(map(str, EVALUATIONS)) + " |")
        print("|---" + len(EVALUATIONS) * "|---:" + "|")
        for sampler, points in results[run].items():
            cells = [f"{distance:.1f} {share:.0%}" for _, distance, share in points]
            cells = [""] * (len(EVALUATIONS) - len(points)) + cells
            print(f"| `{sampler}` | " + " | ".join(cells) + " |")
        print(flush=True)
    plot(results, picture)
    print(f"drew {picture}")
