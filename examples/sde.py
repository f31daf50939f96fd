"""
Draw along a stochastic differential equation rather than a flow, with any run of ddpm.py or cfm.py.

    python examples/sde.py --out_dir=assets/cfm                  # a row for each amount of noise
    python examples/sde.py --noise=1 --n_samples=2000 --save=out/sde.npz      # for bench/quality.py

On the straight path z = tau data + (1 - tau) noise the velocity v = E[data - noise | z] also gives
the expected noise, z - tau v, and so by Tweedie's formula the score, the gradient of log p(z):
    score = -(z - tau v) / (1 - tau).
For any w(tau) >= 0, the equation
    dz = (v + w/2 score) dtau + sqrt(w) dW
has the densities of the flow dz = v dtau at all times (Ma et al. 2024, arXiv 2401.08740, section 2;
Albergo et al. 2023, arXiv 2303.08797). Here w is 2 (1 - tau)^2 times one number, noise. Then in a
short time dtau a share noise dtau of the noise in z is renewed. noise = 0 is the flow. Fresh noise
lets later steps repair what earlier ones got wrong, but Euler-Maruyama needs more steps for it.
"""
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, fail, say
from core.machine import choose_machine
from core.save import claim, labels_to_save, save_pictures, to_bytes
from sample import Draws, flow, load_run, wanted_classes

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
noise = (0.0, 1.0, 3.0, 10.0)    # a row of pictures for each number, all from the same start
n_samples = 20            # pictures in a row
steps = 50                # of Euler-Maruyama
labels = ""               # the classes to draw, in turn; "": all of them
save = "out/sde.png"      # or, of one number, an .npz file for bench/quality.py
batch_size = 250
seed = 0
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"noise": (0, math.inf), "seed": (0, 2**63 - 1),
          **dict.fromkeys(["n_samples", "steps", "batch_size"], (1, math.inf))}


def score(tau, z, v):
    """The gradient of log p(z), (B, *dim), at the time tau < 1 from the velocity v there."""
    return -(z - tau * v) / (1 - tau)


@torch.no_grad()
def euler_maruyama(v, z, taus, noise=1.0, randn=torch.randn_like):
    """
    A sampler like those of sample.py, for the equation above. randn(z) draws noise like z.

    The step that ends at the data adds no noise: nothing would remove it.
    """
    for t, s in pairwise(taus):
        w, now = 2 * noise * (1 - t) ** 2, v(t, z)
        if s == 1:
            return z + (s - t) * now
        z = z + (s - t) * (now + w / 2 * score(t, z, now))
        if w > 0:
            z = z + math.sqrt(w * (s - t)) * randn(z)
    return z


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, *_ = choose_machine(device)
    method, config, checkpoint = load_run(out_dir, device=device)
    if checkpoint["limits"] or not (method.straight and method.renewable):
        fail(f"--out_dir={out_dir} has no score: a one-step run, or another --path or --sigma")
    if steps > method.most_steps:
        fail(f"--steps={steps}: the run has only {method.most_steps}")
    suffix = Path(save).suffix
    if suffix == ".npz" and len(noise) > 1:
        fail(f"--save={save}: an .npz is for one number as --noise")
    claim(Path(save), [".png", ".npz"], or_folder=False)
    classes, shape = checkpoint["data"]["classes"], checkpoint["picture_shape"]
    wanted = wanted_classes(labels, classes) or [-1]
    y = torch.tensor(wanted).repeat(math.ceil(n_samples / len(wanted)))[:n_samples]
    taus, rows = method.times(steps), []
    for number in noise:
        for i in range(0, n_samples, batch_size):
            label = y[i:i + batch_size].to(device)
            draws = Draws(range(i, i + len(label)), shape, device, seed)
            z = draws.randn() * math.hypot(taus[0], 1 - taus[0])     # as in sample.draw()
            v = flow(method, label if classes else None)
            rows.append(euler_maruyama(v, z, taus, number, draws.randn).cpu())
    x = torch.cat(rows)
    if suffix == ".npz":
        save_pictures(Path(save), to_bytes(x), [], labels_to_save(classes, y))
    else:
        save_image(x / 2 + 0.5, Path(save), nrow=n_samples)
    say(f"{len(x)} pictures, {steps} steps each: {save}")
