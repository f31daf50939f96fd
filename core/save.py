"""What sample.py writes: a grid, an animation, an .npz file, or a folder of PNGs."""
import math
import tempfile

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from configurator import explained, fail
from core.checkpoint import atomic_write
from core.pictures import visible
from core.run import lock


def claim(path, endings=(".png", ".gif", ".npz"), or_folder=True):
    """
    Calls fail() if the path cannot be written to, or is a folder that holds other files.

    It must have one of the endings or, for a folder, none. Returns a folder's lock.
    """
    with explained(f"--save={path}: "):
        taken = path.is_dir() and (path.suffix or {p.name for p in path.iterdir()} - {".lock"})
        fits = path.suffix in endings or or_folder and not path.suffix
        if taken or not fits:
            ends, rest = " or ".join(endings), "and not be a folder"
            if or_folder:
                rest = "or else be a new or empty folder without a dot"
            fail(f"--save={path}: must end in {ends}, {rest}")
        folder = path.parent if path.suffix else path
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return None if path.suffix else lock(folder, "--save")           # held while referenced


def to_bytes(x):
    """Pictures (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C), on the CPU."""
    return (x * 127.5 + 127.5).round().clip(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def labels_to_save(classes, y):
    """arr_1: the labels themselves if all class names are numbers, else indices into classes."""
    if not classes:
        return {}
    if all(name.isdecimal() and str(int(name)) == name and int(name) < 2**63 for name in classes):
        return {"arr_1": torch.tensor([*map(int, classes), -1])[y].numpy()}      # -1 stays -1
    return {"arr_1": y.numpy(), "classes": classes}


def save_pictures(path, pictures, frames, arrays):
    """A .png grid or an .npz of pictures, uint8 (N, H, W, C), and arrays, or a .gif of frames."""
    with atomic_write(path) as f:
        if path.suffix == ".png":
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
            grid = make_grid(visible(x, 1), nrow=10)
            to_pil_image(grid).save(f, format="png")
        elif path.suffix == ".gif":
            save_gif(f, [torch.cat(parts) for parts in zip(*frames)])
        else:
            np.savez(f, arr_0=pictures, **arrays)


def save_pngs(folder, pictures, first):
    """One PNG for each of the pictures, uint8 (B, H, W, C), numbered from first."""
    for n, picture in enumerate(torch.from_numpy(pictures).permute(0, 3, 1, 2), first):
        to_pil_image(visible(picture)).save(folder / f"{n:06d}.png")


def save_gif(file, frames):
    """An animation of frames (N, C, H, W) in [-1, 1]: three seconds, then two of the last frame."""
    frames = frames[:-1:math.ceil(len(frames) / 150)] + frames[-1:]     # browsers need 20 ms each
    grids = [make_grid(visible(x, 1), nrow=10, normalize=True, value_range=(-1, 1)) for x in frames]
    colours = 16 if frames[0].shape[1] == 1 else 128                    # few, for a small file
    pictures = [to_pil_image(grid).quantize(colours) for grid in grids]
    pause = 3000 / len(pictures)                                        # in milliseconds
    pictures[0].save(file, format="gif", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[pause] * (len(pictures) - 1) + [2000])
