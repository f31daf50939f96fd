"""
Autoguidance: draw away from what the same run would have drawn early in its training.

    python examples/autoguidance.py --out_dir=assets/cfm                  # a grid
    python examples/autoguidance.py --n_samples=10000 --save=out/digits.npz   # for bench/quality.py

Karras et al. 2024 (arXiv 2406.02507), section 4: with a model D and a worse one,
    D_worse + scale (D - D_worse)
can draw better pictures than D. Where the two agree it changes nothing; where training still made a
difference, a scale above 1 goes further the same way. Here the worse model costs nothing: each run
keeps its averaged weights of the first evaluation after a quarter of its iterations, if one comes
before half of them. A step takes two evaluations, one of each.
"""
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail, say
from core.machine import choose_machine
from core.save import claim, labels_to_save, save_pictures, to_bytes
from sample import Draws, Evaluations, check_sampler, draw, load_run, wanted_classes

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
scale = 2.0               # 0: its early weights, 1: the run itself, above 1: guided
sampler = "dpm++"         # or another of sample.py
steps = 6                 # of the sampler
n_samples = 100
labels = ""               # the classes to draw, in turn; "": all of them
save = "out/guided.png"   # or an .npz file
batch_size = 100
seed = 0                  # of the noise, as in sample.py
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"scale": (0, math.inf), "seed": (0, 2**63 - 1),
          **dict.fromkeys(["n_samples", "steps", "batch_size"], (1, math.inf))}


class Autoguided(torch.nn.Module):
    """A network of the form model(t, x, y) that returns early + scale (model - early), like x."""

    def __init__(self, model, early, scale):
        super().__init__()
        self.model, self.early, self.scale = model, early, scale

    def forward(self, t, x, y=None):
        early = self.early(t=t, x=x, y=y)
        return torch.lerp(early, self.model(t=t, x=x, y=y), self.scale)


def load_guided(folder, scale, device="cpu"):
    """(method, checkpoint) of the run in a folder, guided. Calls fail() if there is no such run."""
    method, config, checkpoint = load_run(folder, device=device)
    if not checkpoint["early"]:
        fail(f"--out_dir={folder}: the run has no early weights, which it keeps at the first "
             "evaluation between a quarter and half of its iterations")
    early = copy.deepcopy(method.model)
    with explained(f"--out_dir={folder}: "):
        early.load_state_dict(checkpoint["early"])
    script = sys.modules[type(method).__module__]
    guided = script.build(Autoguided(method.model, early, scale), config, device)
    guided.means = method.means
    return guided, checkpoint


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, *_ = choose_machine(device)
    method, checkpoint = load_guided(out_dir, scale, device)
    with explained():
        check_sampler(sampler, method)
    if steps > method.most_steps:
        fail(f"--steps={steps}: the run has only {method.most_steps}")
    claim(Path(save), [".png", ".npz"], or_folder=False)
    classes, shape = checkpoint["data"]["classes"], checkpoint["picture_shape"]
    wanted = wanted_classes(labels, classes) or [-1]
    y = torch.tensor(wanted).repeat(math.ceil(n_samples / len(wanted)))[:n_samples]
    count, pictures = Evaluations(method.model.model), []
    for i in range(0, n_samples, batch_size):
        label = y[i:i + batch_size].to(device)
        draws = Draws(range(i, i + len(label)), shape, device, seed)
        noise = draws.randn()
        options = {"randn": draws.randn} if sampler in method.textbook else {}
        count.restart()
        with explained(kind=FloatingPointError):             # dopri5 may fail
            pictures.append(to_bytes(draw(method, noise, label, sampler, steps, **options)))
    x = np.concatenate(pictures)
    with explained(f"--save={save}: ", OSError):
        save_pictures(Path(save), x, [], labels_to_save(classes, y))
    say(f"{n_samples} pictures, scale {scale:g}, {2 * count.count} evaluations: {save}")
