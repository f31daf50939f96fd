"""
Enlarge a small picture, with any run of ddpm.py or cfm.py. Averaged down, it gives the input.

    python examples/enlarge.py --out_dir=assets/cfm                  # ten held-out digits, of 7 x 7
    python examples/enlarge.py --factor=2 --labels=3,8               # you know what they are
    python examples/enlarge.py --picture=my.png                      # a small one of your own

PnP-Flow (Martin et al. 2024, arXiv 2410.02423, section 3) repeats three steps as tau goes from 0,
which is noise, to 1: make the picture agree with what is known; mix in noise, (1 - tau) of it; let
the model predict the picture in that mixture. Here a small pixel is the mean of a block. If nothing
says which class it is, one is drawn by how well each predicts the means, see weigh_classes().
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail, say
from core.data import load_held_out
from core.machine import choose_machine
from core.pictures import load_picture
from core.save import claim, save_pngs, to_bytes
from sample import flow, load_run, predictions, wanted_classes

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
factor = 4                # by which to enlarge: 28 x 28 pixels come from 7 x 7
picture = ""              # a file, brought to the small size; "": held-out pictures, averaged
versions = 4              # of each picture
n_pictures = 10           # held-out ones, if no picture is given
labels = ""               # the classes of the pictures, in turn; "": unknown
steps = 20                # evaluations of the model for a version
background = "black"      # behind a transparent picture
invert = False            # for dark ink on white paper, if the run's pictures are white on black
save = "out/enlarge.png"  # a row a picture: it, smoothed, its versions; or a new folder, for PNGs
data_dir = ""             # where the run's data are, if they have moved
seed = 0
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"seed": (0, 2**63 - 1), "factor": (2, math.inf),
          **dict.fromkeys(["versions", "n_pictures", "steps"], (1, math.inf))}


def project_means(x, small, factor):
    """
    The nearest pictures to x (B, C, H, W) that lie in [-1, 1] and whose block means are small's.

    Nearest in Kullback-Leibler divergence, each pixel being a biased coin: in atanh(x) all of a
    block moves by one amount, found by bisection. So black and white hardly move.
    """
    blocks = F.pixel_unshuffle(x.clamp(-0.999, 0.999).atanh(), factor)
    blocks = blocks.unflatten(1, (-1, factor**2))    # (B, C, values of a block, h, w)
    low, high = torch.full_like(small[:, :, None], -20), 20          # either puts all at one end
    for _ in range(30):
        middle = (low + high) / 2
        below = (blocks + middle).tanh().mean(2, keepdim=True) < small[:, :, None]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return F.pixel_shuffle((blocks + low).tanh().flatten(1, 2), factor)


@torch.no_grad()
def weigh_classes(method, project, x, n_classes, trials=5, sharpness=6, randn=torch.randn_like):
    """
    How likely each class is, given what is known of each picture: (B, n_classes), summing to 1.

    x (B, C, H, W) is any picture, and project(x) one near it that agrees with what is known. For x
    as the model predicts it, told the class, log |project(x) - x|^2 is, up to a constant, -2 / n
    times the log likelihood of n Gaussian errors of the best width. Li et al. 2023 (arXiv
    2303.16203) classify by such errors. sharpness stands for n / 2, as they are not independent;
    6 was chosen for digits.
    """
    x, misfit = [x] * n_classes, torch.zeros(len(x), n_classes, device=x.device)
    for tau in [(i + 1) / (2 * trials) for i in range(trials)]:
        noise = randn(x[0])                          # the same for all classes, to compare them
        for k in range(n_classes):
            v = flow(method, torch.full((len(noise),), k, device=noise.device))
            z = tau * project(x[k]) + (1 - tau) * noise
            x[k], _ = predictions(tau, z, v(tau, z), clip=True)
            error = (project(x[k]) - x[k]).flatten(1).square().sum(1)
            misfit[:, k] += error.clamp(min=1e-6).log()
    return (-sharpness * misfit).softmax(1)


@torch.no_grad()
def restore(method, project, x, y=None, steps=20, randn=torch.randn_like):
    """
    PnP-Flow: pictures (B, *dim) that agree with what is known, for project and x as above.

    What the model predicts is clipped to [-1, 1], so data must lie within. randn(x) draws noise.
    Fills of one picture differ, but by less than the posterior would have it.
    """
    v = flow(method, y)
    for tau in method.times(steps)[:-1]:
        z = tau * project(x) + (1 - tau) * randn(x)
        x, _ = predictions(tau, z, v(tau, z), clip=True)
    return project(x)


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, *_ = choose_machine(device)
    method, config, checkpoint = load_run(out_dir, device=device)
    if checkpoint["limits"] or not (method.straight and method.renewable):
        fail(f"--out_dir={out_dir} cannot edit: made for one step, or with other --path or --sigma")
    classes, (C, H, W) = checkpoint["data"]["classes"], checkpoint["picture_shape"]
    if H % factor or W % factor:
        fail(f"--factor={factor} does not divide the run's pictures of {W} x {H} pixels")
    wanted = wanted_classes(labels, classes)
    if picture:
        small = C, H // factor, W // factor
        given = load_picture(picture, small, background, invert, method.means)
    else:
        large, _ = load_held_out(config, checkpoint, n_pictures, data_dir=data_dir)
        given = F.avg_pool2d(large.float(), factor).round()
    if labels and len(wanted) > len(given):
        fail(f"--labels={labels}: more classes, {len(wanted)}, than pictures, {len(given)}")
    claimed = claim(Path(save), [".png"])            # the lock, if it is a folder
    torch.manual_seed(seed)
    given = given.to(device).float() / 127.5 - 1
    small = given.repeat_interleave(versions, 0)     # each picture's in a row
    y = torch.tensor((wanted * len(small))[:len(given)], device=device).repeat_interleave(versions)

    def project(x):
        return project_means(x, small, factor)

    x = F.interpolate(small, scale_factor=factor)
    if classes and not labels:
        y = weigh_classes(method, project, x, len(classes)).multinomial(1).squeeze(1)
        for i, drawn in enumerate(y.split(versions)):
            say(f"picture {i}: enlarged as {', '.join(classes[k] for k in drawn)}")
    large = restore(method, project, x, y if classes else None, steps)
    if claimed:
        save_pngs(Path(save), to_bytes(large), 0)
    else:
        smooth = F.interpolate(given, scale_factor=factor, mode="bicubic").clamp(-1, 1)
        rows = [x[::versions, None], smooth[:, None], large.unflatten(0, (-1, versions))]
        save_image(torch.cat(rows, 1).flatten(0, 1) / 2 + 0.5, Path(save), nrow=2 + versions)
    say(f"{len(large)} enlarged pictures: {save}")
