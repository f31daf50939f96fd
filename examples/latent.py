"""
The noise from which a picture is drawn: from pictures to noise and back, and between two noises.

    python examples/latent.py                                # with assets/cfm, into out/latent.png
    python examples/latent.py --out_dir=out/cfm --task=reconstruct
    python examples/latent.py --out_dir=out/ddpm --labels=3,8 --n_samples=40 --save=between.png

Without fresh noise a sampler follows a flow, an ordinary differential equation. So each picture has
one noise, which the flow finds when it runs backwards: Song et al. 2020 (arXiv 2010.02502), section
5.4 and eq. 14. And noises in between give pictures in between: section 5.3. Both methods have such
a flow, see sample.flow().
"""
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail, say
from core.data import load_held_out
from core.machine import choose_machine
from core.save import claim, labels_to_save, save_pictures, to_bytes
from sample import SAMPLERS, Evaluations, draw, flow, load_run, times, wanted_classes

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
task = "interpolate"      # each row goes from one noise to another; or
#                           reconstruct: held-out pictures, each beside what comes back from noise
n_samples = 100           # pictures to draw
save = "out/latent.png"   # a grid; or x.npz: arr_0, uint8 (N, H, W, C), what was drawn, and
#                           arr_1, labels (N,)
sampler = "rk4"           # one that can run backwards
steps = 0                 # 0: 20, if the run has as many. dopri5 takes as many as it needs
labels = ""               # interpolate: the class of each row in turn, 3,1,4 or cat,dog; "": all
dataset = ""              # reconstruct: where the run's data are, if they have moved
data_dir = ""             # and where downloads are kept
seed = 0                  # of the noise
ema = True                # the averaged weights; false: the latest
batch_size = 0            # pictures at a time; 0: 100 on a CPU, 250 elsewhere
device = "auto"           # cuda, cuda:1, mps or cpu
# -----------------------------------------------------------------------------
LIMITS = {
    "task": ["interpolate", "reconstruct"],
    "sampler": ["euler", "midpoint", "heun", "rk4", "dopri5"],
    "n_samples": (1, math.inf),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(["steps", "batch_size"], (0, math.inf)),
}


@torch.no_grad()
def encode(method, x, y=None, sampler="rk4", steps=20, **options):
    """
    The noise (B, *dim) from which sample.draw() makes the pictures x: the flow run backwards.

    A model of ddpm.py has seen no picture without noise, so the first step is one of Euler's, to
    the least noise that it knows. options are the sampler's: atol and rtol of dopri5.
    """
    v, latest = flow(method, y), method.times(2, even=True)[-1]
    taus = [tau for tau in times(method, sampler, steps) if tau <= latest][::-1]
    z = x - (1 - taus[0]) * v(taus[0], x) if taus[0] < 1 else x
    return SAMPLERS[sampler](v, z, taus, **options) / math.hypot(taus[-1], 1 - taus[-1])


def slerp(a, b, t):
    """A point on the arc from noise a to noise b, at t in [0, 1]. On the chord it is too short."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.acos(cosine)
    of_a, of_b = torch.sin((1 - t) * angle), torch.sin(t * angle)
    return of_a / torch.sin(angle) * a + of_b / torch.sin(angle) * b


def rows_of_noise(numbers, shape, seed=0):
    """Noise (B, *shape) of the pictures with these numbers: every ten form an arc, end to end."""
    noise = []
    for n in numbers:
        ends = [torch.Generator().manual_seed(hash((seed, n // 10, end))) for end in (0, 1)]
        a, b = [torch.randn(shape, generator=end) for end in ends]
        noise.append(slerp(a, b, n % 10 / 9))
    return torch.stack(noise)


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, _, _ = choose_machine(device)
    torch.backends.cudnn.allow_tf32 = False                  # its errors are larger than rk4's
    torch.set_float32_matmul_precision("highest")
    method, config, checkpoint = load_run(out_dir, ema, device)
    classes, shape = checkpoint["data"]["classes"], checkpoint["picture_shape"]

    # the request, and whether it can be met
    if "steps" in checkpoint["limits"]:
        fail(f"{out_dir} draws in one step only: it has no flow that could run backwards")
    if sampler == "dopri5" and steps:
        fail(f"--steps={steps}: dopri5 takes as many as it needs")
    if steps > method.most_steps:
        fail(f"--steps={steps}: the run has only {method.most_steps}")
    if task == "reconstruct" and labels:
        fail("--labels: --task=reconstruct takes the held-out pictures' own labels")
    wanted = wanted_classes(labels, classes)
    steps = steps or min(method.most_steps, 20)
    batch_size = batch_size or (100 if device == "cpu" else 250)
    save = Path(save)
    claim(save, [".png", ".npz"], or_folder=False)
    if task == "reconstruct":
        held_out, y = load_held_out(config, checkpoint, n_samples, dataset, data_dir)
    else:
        y = torch.tensor(wanted or [-1]).repeat_interleave(10)
        y = y.repeat(math.ceil(n_samples / len(y)))[:n_samples]

    evaluations, pictures, cost, start = Evaluations(method.model), [], 0, time.monotonic()
    how = sampler if sampler == "dopri5" else f"{sampler}, {steps} steps"
    say(f"{task}: {n_samples} pictures, {checkpoint['method']} at iteration "
        f"{checkpoint['iteration']}: {how}, on {device}")
    for i in range(0, n_samples, batch_size):
        label = y[i:i + batch_size].to(device)
        evaluations.restart()
        with explained(kind=FloatingPointError):             # dopri5 may fail
            if task == "reconstruct":
                x = held_out[i:i + batch_size].to(device).float() / 127.5 - 1
                noise = encode(method, x, label, sampler, steps)
            else:
                noise = rows_of_noise(range(i, i + len(label)), shape, seed).to(device)
            x = draw(method, noise, label, sampler, steps, clip=task == "interpolate")
        pictures.append(to_bytes(x))
        cost = max(cost, evaluations.count)

    pictures = np.concatenate(pictures)
    shown = pictures
    if task == "reconstruct":
        originals = held_out.permute(0, 2, 3, 1).numpy()
        gap = pictures - originals.astype(float)
        say(f"reconstructed to {np.sqrt((gap**2).mean()):.3f} of 255 grey levels (rms), "
            f"{abs(gap).max():.0f} at worst")
        shown = np.stack([originals, pictures], 1).reshape(-1, *pictures.shape[1:])
    with explained(f"--save={save}: ", OSError):
        save_pictures(save, shown if save.suffix == ".png" else pictures, [],
                      labels_to_save(classes, y))
    say(f"{time.monotonic() - start:.1f} s, {cost} evaluations of the model: {save}")
