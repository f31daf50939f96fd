"""
Fill in what a mask leaves out of a picture, with any run of ddpm.py or cfm.py. No retraining.

    python examples/inpaint.py --out_dir=assets/cfm                  # ten held-out digits
    python examples/inpaint.py --mask=square --labels=3,8            # you know what is hidden
    python examples/inpaint.py --picture=my.png --mask=mask.png      # white in the mask is hidden

PnP-Flow (Martin et al. 2024, arXiv 2410.02423, section 3) repeats three steps as tau goes from 0,
which is noise, to 1: make the picture agree with what is known; mix in noise, (1 - tau) of it; let
the model predict the picture in that mixture. Here the first step puts the known pixels back. If
nothing says which class it is, one is drawn by how well each predicts them, see weigh_classes().
"""
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail, say
from core.data import load_held_out
from core.machine import choose_machine
from core.pictures import load_picture
from core.save import claim, labels_to_save, save_pictures, save_pngs, to_bytes
from sample import flow, load_run, predictions, wanted_classes

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
picture = ""              # a file, brought to the run's size; "": held-out pictures of the run
mask = "right"            # the part to fill in: right, left, upper or lower half, or square, the
#                           middle; or a file of the picture's shape, or the run's size, white where
#                           pixels are hidden
fills = 4                 # of each picture
n_pictures = 10           # held-out ones, if no picture is given
labels = ""               # the classes of the pictures, in turn; "": unknown
steps = 20                # evaluations of the model for a fill
background = "black"      # behind a transparent picture
invert = False            # for dark ink on white paper, if the run's pictures are white on black
save = "out/inpaint.png"  # a row for each picture: it, what is known, the fills; or, for the fills
#                           alone, an .npz or a new folder of PNGs
data_dir = ""             # where the run's data are, if they have moved
seed = 0
device = "auto"
# -----------------------------------------------------------------------------
PARTS = {"right": (0, 4, 2, 4), "left": (0, 4, 0, 2), "upper": (0, 2, 0, 4),
         "lower": (2, 4, 0, 4), "square": (1, 3, 1, 3)}      # top, bottom, left, right, in quarters
LIMITS = dict.fromkeys(["fills", "n_pictures", "steps"], (1, math.inf)) | {"seed": (0, 2**63 - 1)}


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


def read_mask(mask, H, W):
    """Which pixels are known, bool (1, 1, H, W); calls fail() if that is all of them, or none."""
    hidden = torch.zeros(1, 1, H, W, dtype=torch.bool)
    if mask in PARTS:
        top, bottom, left, right = PARTS[mask]
        hidden[..., H * top // 4:H * bottom // 4, W * left // 4:W * right // 4] = True
    else:
        with explained(f"--mask={mask} must be one of {', '.join(PARTS)}, or a picture's file: "):
            found = Image.open(mask).convert("L")
            if found.width < W or found.height < H:
                size = f"{found.width} x {found.height}"
                raise ValueError(f"of at least {W} x {H} pixels, not {size}")
            found = found.point(lambda value: 255 * (value > 127))
            found = ImageOps.fit(found, (W, H), Image.Resampling.BOX)
            hidden = pil_to_tensor(found)[None] > 0          # wherever any of it is white
    if hidden.all() or not hidden.any():
        fail(f"--mask={mask} must hide some pixels, which are white, and not all")
    return ~hidden


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, *_ = choose_machine(device)
    method, config, checkpoint = load_run(out_dir, device=device)
    if checkpoint["limits"] or not (method.straight and method.renewable):
        fail(f"--out_dir={out_dir} cannot edit: made for one step, or with other --path or --sigma")
    classes, shape = checkpoint["data"]["classes"], checkpoint["picture_shape"]
    wanted, keep = wanted_classes(labels, classes), read_mask(mask, *shape[1:]).to(device)
    if picture:
        given = load_picture(picture, shape, background, invert, method.means)
    else:
        given = load_held_out(config, checkpoint, n_pictures, data_dir=data_dir)[0]
    if labels and len(wanted) > len(given):
        fail(f"--labels={labels}: more classes, {len(wanted)}, than pictures, {len(given)}")
    claimed = claim(Path(save), [".png", ".npz"])    # the lock, if it is a folder
    torch.manual_seed(seed)
    given = given.to(device).float() / 127.5 - 1
    known = torch.where(keep, given, 0).repeat_interleave(fills, 0)      # each picture's in a row
    y = torch.tensor((wanted * len(known))[:len(given)], device=device).repeat_interleave(fills)

    def project(x):
        return torch.where(keep, known, x)

    if classes and not labels:
        y = weigh_classes(method, project, known, len(classes)).multinomial(1).squeeze(1)
        for i, drawn in enumerate(y.split(fills)):
            say(f"picture {i}: filled in as {', '.join(classes[k] for k in drawn)}")
    filled = restore(method, project, known, y if classes else None, steps)
    if claimed:
        save_pngs(Path(save), to_bytes(filled), 0)
    elif Path(save).suffix == ".npz":
        save_pictures(Path(save), to_bytes(filled), [], labels_to_save(classes, y.cpu()))
    else:
        rows = [given[:, None], known[::fills, None], filled.unflatten(0, (-1, fills))]
        save_image(torch.cat(rows, 1).flatten(0, 1) / 2 + 0.5, Path(save), nrow=2 + fills)
    say(f"{len(filled)} fills: {save}")
