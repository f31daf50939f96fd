"""
Vary a picture, from almost the same to new, with any run of ddpm.py or cfm.py. No retraining.

    python examples/vary.py --out_dir=assets/cfm                     # ten held-out digits
    python examples/vary.py --labels=8 --strengths=0.5,0.6,0.7       # turn them into eights
    python examples/vary.py --picture=my.png --seed=1                # a drawing of your own

SDEdit (Meng et al. 2021, arXiv 2108.01073, section 3) starts in the middle of the path: noise takes
the place of a share of the picture, and the model goes on from there. What the noise drowns is
made up, and the rest stays. More noise drowns first the pen, then the style, and last the class.
"""
import math
import sys
from pathlib import Path

import torch
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, fail, say
from core.data import load_held_out
from core.machine import choose_machine
from core.pictures import load_picture
from core.save import claim
from sample import dpm_solver, flow, load_run, wanted_classes

# -----------------------------------------------------------------------------
out_dir = "assets/cfm"    # folder of the run
picture = ""              # a file, brought to the run's size; "": held-out pictures of the run
strengths = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)   # shares of noise; 1: all is new
n_pictures = 10           # held-out ones, if no picture is given
labels = ""               # what to make of the pictures, in turn; "": the model is not told
steps = 20                # for strength 1, fewer for less
background = "black"      # behind a transparent picture
invert = False            # for dark ink on white paper, if the run's pictures are white on black
save = "out/vary.png"     # a row for each picture: it, then a variation of each strength
data_dir = ""             # where the run's data are, if they have moved
seed = 0
device = "auto"
# -----------------------------------------------------------------------------
LIMITS = {"strengths": (0, 1), "seed": (0, 2**63 - 1),
          **dict.fromkeys(["n_pictures", "steps"], (1, math.inf))}


@torch.no_grad()
def vary(method, x, noise, strength, y=None, steps=20):
    """
    A variation of pictures x (B, C, H, W) in [-1, 1]: SDEdit from tau = 1 - strength.

    noise (B, C, H, W) is standard normal. The same noise at several strengths makes a strip that
    changes little by little. At strength 0 it is x itself.
    """
    taus = method.times(steps)
    start = max(taus[0], 1 - strength)
    if start == 1:
        return x
    z = start * x + (1 - start) * noise
    return dpm_solver(flow(method, y), z, [start] + [tau for tau in taus if tau > start])


if __name__ == "__main__":
    configure(globals(), LIMITS)
    device, *_ = choose_machine(device)
    method, config, checkpoint = load_run(out_dir, device=device)
    if checkpoint["limits"] or not (method.straight and method.renewable):
        fail(f"--out_dir={out_dir} cannot edit: made for one step, or with other --path or --sigma")
    classes, shape = checkpoint["data"]["classes"], checkpoint["picture_shape"]
    wanted = wanted_classes(labels, classes)
    if picture:
        x = load_picture(picture, shape, background, invert, method.means)
    else:
        x, _ = load_held_out(config, checkpoint, n_pictures, data_dir=data_dir)
    if labels and len(wanted) > len(x):
        fail(f"--labels={labels}: more classes, {len(wanted)}, than pictures, {len(x)}")
    claim(Path(save), [".png"], or_folder=False)
    torch.manual_seed(seed)
    x = x.to(device).float() / 127.5 - 1
    noise = torch.randn_like(x)
    y = torch.tensor((wanted * len(x))[:len(x)], device=device) if labels else None
    columns = [x] + [vary(method, x, noise, strength, y, steps) for strength in strengths]
    save_image(torch.stack(columns, 1).flatten(0, 1) / 2 + 0.5, Path(save), nrow=len(columns))
    say(f"{len(x)} x {len(strengths)} variations: {save}")
