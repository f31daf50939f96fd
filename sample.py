"""
Draw pictures with a checkpoint, of ddpm.py or of cfm.py: it knows which.

    python sample.py --out_dir=out/cfm                                            # a grid: out/cfm/samples.png
    python sample.py --out_dir=out/cfm --labels=3,1,4 --guidance=2                # threes, ones and fours in turn
    python sample.py --out_dir=out/ddpm --sampler=ancestral --save=pictures       # a folder of PNGs
    python sample.py --out_dir=out/cfm --n_samples=10000 --save=samples.npz       # for FID tools, or to train on

The same seed gives the same pictures whatever the batch_size, up to rounding; ancestral sampling and eta > 0, which
draw noise in every step, depend on batch_size too.
"""
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image

import cfm
import ddpm
from configurator import configure, fail
from unet import UNet

# ------------------------------------------------------------------------------------------------------------
out_dir = "out/cfm"          # of the run whose ckpt.pt is used
n_samples = 100
save = "auto"                # .png: a grid; .npz: arr_0 uint8 (N, H, W, C), arr_1 labels (N,); else a folder
sampler = "auto"             # ddim, ancestral; euler, midpoint, heun, rk4; auto: as the run drew its grids
steps = 0                    # 0: as many as the run drew its grids with (ancestral: all)
eta = 0.0                    # noise in a step of ddim, from 0 to 1
guidance = 1.0               # 1: the conditional model as it is; 0: the unconditional; above 1: exaggerated labels
labels = ()                  # the classes to draw, in turn: 3 or 3,1,4; (): all of them
seed = 0
ema = True                   # the averaged weights; false: the latest
batch_size = 250             # pictures drawn at a time
device = "auto"              # cuda, cuda:1, mps or cpu
# ------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    configure(globals(), {"n_samples batch_size": (1, math.inf), "steps guidance labels": (0, math.inf),
                          "eta": (0, 1)})
    checkpoint = ddpm.load_checkpoint(Path(out_dir, "ckpt.pt"))
    script, config = {"ddpm": ddpm, "cfm": cfm}[checkpoint["method"]], checkpoint["config"]
    num_classes, (C, H, W) = checkpoint["model_args"]["num_classes"], checkpoint["picture_shape"]

    sampler = config["sampler"] if sampler == "auto" else sampler
    if sampler not in script.LIMITS["sampler"]:
        fail(f"--sampler={sampler} is not for {script.METHOD}, choose {' or '.join(script.LIMITS['sampler'])}")
    if sampler == "ancestral" and steps not in (0, config["n_steps"]):
        fail(f"--steps={steps}: ancestral sampling takes all {config['n_steps']} steps, --sampler=ddim any number")
    if script is ddpm and steps > config["n_steps"]:
        fail(f"--steps={steps}: the run has only {config['n_steps']}")
    if eta and sampler != "ddim":
        fail(f"--eta={eta} goes with --sampler=ddim, not with {sampler}")
    if labels and max(labels) >= num_classes:
        known = f"0 to {num_classes - 1}" if num_classes else "none"
        fail(f"--labels: there is no {max(labels)}, the model has {known}")
    if guidance != 1 and not num_classes:
        fail(f"--guidance={guidance}: the model was trained without labels, so it has nothing to be guided by")
    steps = steps or config["sample_steps"]
    if script is ddpm:
        steps = config["n_steps"] if sampler == "ancestral" else min(steps, config["n_steps"])
    device = ddpm.choose_device(device)
    save = Path(out_dir, "samples.png") if save == "auto" else Path(save)
    if save.suffix not in (".png", ".npz", "") or save.is_dir() and any(save.iterdir()):
        fail(f"--save={save}: must end in .png or .npz, or else be a new or empty folder")
    try:
        (save.parent if save.suffix else save).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--save={save} cannot be made ({e.strerror})")

    model = UNet(**checkpoint["model_args"]).to(device, memory_format=torch.channels_last).eval()
    model.load_state_dict(checkpoint["ema" if ema else "model"])
    method, options = script.build(model, config, device), {"eta": eta} if script is ddpm else {}
    evaluations = steps * len(script.VelocityField.TABLEAUS[sampler][0]) if script is cfm else steps
    print(f"{n_samples} pictures by {script.METHOD}, iteration {checkpoint['iteration']}: {sampler}, {steps} steps, "
          f"{evaluations} evaluations of the model each, guidance {guidance}, on {device}", flush=True)

    y = torch.tensor((labels or range(num_classes)) if num_classes else [-1]).repeat(n_samples)[:n_samples]
    pictures = np.empty((n_samples, H, W, C), np.uint8)
    start, noise_source = time.time(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for i in range(0, n_samples, batch_size):
        noise = torch.stack([torch.randn(C, H, W, generator=noise_source) for _ in y[i:i + batch_size]])
        x = method.sample(noise.to(device), y[i:i + batch_size].to(device), steps, sampler, guidance, **options)
        x = (x * 127.5 + 127.5).round().clip(0, 255).byte()
        pictures[i:i + batch_size] = x.permute(0, 2, 3, 1).cpu().numpy()
        if i + batch_size < n_samples:
            done = i + batch_size
            print(f"{done} drawn, {(time.time() - start) / done * (n_samples - done) / 60:.1f} min left", flush=True)

    if save.suffix == ".png":
        save_image(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, save, nrow=10)
    elif save.suffix == ".npz":
        with open(f"{save}.tmp", "wb") as f:
            np.savez(f, pictures, *([y.numpy()] if num_classes else []))          # named arr_0, arr_1 by numpy
        os.replace(f"{save}.tmp", save)
    else:
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.squeeze(2) if C == 1 else picture).save(save / f"{i:06d}.png")
    print(f"{time.time() - start:.1f} s: {save}")
