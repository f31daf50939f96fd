"""
How good are drawn faces? Each one is read back, part by part, so the figures are exact.

    python cfm.py config/faces.py
    python sample.py --out_dir=out/faces --n_samples=10000 --save=out/faces/faces.npz
    python bench/faces.py out/faces/faces.npz         # as many files as you like; a row for each

A row gives
    legal        the share in which every part is one of its designs, in one of its colours: all
                 pixels are within a tolerance of a face that core/faces.py can draw. It is less
                 than half the smallest distance of two colours, so that face is the only one. The
                 distance is the largest difference in red, green or blue, which go up to 255
    asked        the share that is of the class asked for: that as which most parts can be read
    new          the share of the legal faces that are not in the training set. Of held-out
                 faces it is what chance gives
    balance      how far the designs of a part, or the colours of a paint, are from as frequent as
                 in the training set: their total variation distance, from 0 to 1, in the legal
                 faces. The row has the largest; a second table has them all, and beside each the
                 share of all faces in which that part could be read. It expects as many faces of
                 one class as of another
With more than a billion faces to draw, almost any is new. To see whether a model copies, train it
on a few:
    python bench/faces.py --train=1000 --save=out/few.npz      # the first 1,000 training faces
    python cfm.py config/faces.py --dataset=out/few.npz --out_dir=out/few
    python sample.py --out_dir=out/few --n_samples=10000 --save=out/few/faces.npz
    python bench/faces.py out/few/faces.npz --train=1000
"""
import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail
from core.data import read_npz
from core.faces import (BARE, CLASSES, COLOURS, COLUMNS, LETTERS, PAINTS, PARTS, SIZE, designs_of,
                        draw, draw_faces)

# -----------------------------------------------------------------------------
train = 45_000               # how many of the training faces the model has seen: the first ones
save = ""                    # x.npz: write these there, as a data set
# -----------------------------------------------------------------------------
LIMITS = {"train": (1, 45_000)}
CHOSEN = [name for name in COLUMNS if name in PARTS or " " in PAINTS[name][1]]
RGB = np.array([*COLOURS.values()], np.int16)                    # (colours, 3)
DISTANCE = min(abs(a - b).max() for a, b in combinations(RGB, 2))
TOLERANCE = (DISTANCE - 1) // 2


def choices_by_colour():
    """
    Which choice of its paint a letter's colour is, (letters, colours + 1), or -1 for none.

    The last column is for a colour of -1, one that was not recognised.
    """
    names, tables = list(COLOURS), []
    for letters, choices in PAINTS.values():
        for tone, _ in enumerate(letters):
            table = np.full(len(names) + 1, -1, np.int8)
            for choice, colour in enumerate(choices.split()):
                table[names.index(colour.split(",")[tone])] = choice
            tables.append(table)
    return np.stack(tables)


CHOICES = choices_by_colour()


def read_colours(x):
    """Which of COLOURS is where in pictures x, (N, 16, 16), -1 for none within the tolerance."""
    x = x.permute(0, 2, 3, 1).numpy().astype(np.int16)
    found = np.full(x.shape[:3], -1, np.int8)
    for colour, rgb in enumerate(RGB):
        found[(abs(x - rgb) <= TOLERANCE).all(-1)] = colour
    return found


def read_part(colours, region, letters):
    """
    Which faces have these letters in this region, (N,), and {column: its number (N,)} of paints.

    colours is (N, 16, 16), region and letters are (16, 16).
    """
    fits, paints = np.ones(len(colours), bool), {}
    for letter in np.unique(letters[region]):
        chosen = CHOICES[letter][colours[:, region & (letters == letter)]]     # (N, places)
        fits &= (chosen >= 0).all(1) & (chosen == chosen[:, :1]).all(1)
        paint = next(p for p, (used, _) in PAINTS.items() if LETTERS[letter] in used)
        column = COLUMNS.index(paint)
        fits &= chosen[:, 0] == paints.setdefault(column, chosen[:, 0])       # both of its tones
    return fits, paints


def read_as(colours, kind):
    """
    (faces (N, columns), how many parts could be read (N,)), read as faces of one class.

    What is bare in all faces of the class counts as a part too. What cannot be read is -1.
    """
    faces, rest = np.full((len(colours), len(COLUMNS)), -1), np.ones((SIZE, SIZE), bool)
    count = np.zeros(len(colours), int)

    def note(fits, paints):
        count[fits] += 1
        for column, numbers in paints.items():
            free = fits & (faces[:, column] < 0)
            faces[free, column] = numbers[free]

    for j, part in enumerate(PARTS):
        designs = np.stack([*PARTS[part].values()])
        region = designs[designs_of(kind, part)].any(0)
        rest &= ~region
        for number in designs_of(kind, part):
            letters = np.where(designs[number], designs[number], BARE)
            fits, paints = read_part(colours, region, letters)
            faces[fits, j] = number
            note(fits, paints)
    note(*read_part(colours, rest, BARE))
    return faces, count


def read(x):
    """
    (faces (N, columns), classes (N,), legal (N,)) of pictures x uint8 (N, 3, 16, 16).

    What cannot be read is -1. The class is the one as which most parts can be read. A face is
    legal if what was read, drawn again, is the same within the tolerance.
    """
    colours = read_colours(x)
    readings, counts = map(np.stack, zip(*[read_as(colours, kind) for kind in CLASSES]))
    classes = counts.argmax(0)
    faces = readings[classes, np.arange(len(x))]
    same = (draw(faces).int() - x.int()).abs().amax((1, 2, 3)).numpy() <= TOLERANCE
    return faces, classes, same & (counts.max(0) == len(PARTS) + 1)


def frequencies(numbers):
    """How often each of the numbers (N,) occurs, from -1 up: shares (20,)."""
    return np.bincount(numbers + 1, minlength=20) / len(numbers)


def judge(x, y, known):
    """
    {"legal", "asked", "new": shares, "balance": {column: distance}} of pictures x and labels y.

    known (M, columns) are the faces of the training set. "read" is {part: share that can be read}.
    """
    faces, classes, legal = read(x)
    found = {"legal": legal.mean(), "asked": (classes == y.numpy()).mean(),
             "read": dict(zip(PARTS, (faces >= 0).mean(0))), "new": math.nan,
             "balance": dict.fromkeys(CHOSEN, math.nan)}
    if legal.any():
        faces, old = faces[legal], {face.tobytes() for face in known}
        found["new"] = np.mean([face.tobytes() not in old for face in faces])
        for name in CHOSEN:
            a, b = [frequencies(rows[:, COLUMNS.index(name)]) for rows in (faces, known)]
            found["balance"][name] = abs(a - b).sum() / 2
    return found


def read_pictures(file):
    """(x uint8 (N, 3, 16, 16), labels y (N,)) from an .npz file; calls fail() if it is unfit."""
    with explained(f"{file}: "):
        x, y, *_ = read_npz(file)
    if x.shape[1:] != (SIZE, SIZE, 3) or not len(x):
        fail(f"{file}: arr_0 must be uint8 (N, {SIZE}, {SIZE}, 3), but is {x.shape}")
    if y.min() < 0 or y.max() >= len(CLASSES):
        fail(f"{file}: arr_1 must be a class for each picture, from 0 to {len(CLASSES) - 1}")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long()


if __name__ == "__main__":
    files = [a for a in sys.argv[1:] if a.endswith(".npz") and not a.startswith("--")]
    configure(globals(), LIMITS, [a for a in sys.argv[1:] if a not in files])
    sets = {file: read_pictures(file) for file in files}

    x, y, faces = draw_faces(50_000)
    held_out, known = (x[:5000], y[:5000]), faces[5000:5000 + train]       # as in load_faces
    if save:
        if Path(save).suffix != ".npz":
            fail(f"--save={save}: must end in .npz")
        x, y = x[5000:5000 + train], y[5000:5000 + train]
        with explained(f"--save={save}: "):
            np.savez(save, x.permute(0, 2, 3, 1).numpy(), y.numpy(), classes=CLASSES)
    print(f"any two colours are {DISTANCE} or more apart, so a pixel may be off by {TOLERANCE}")
    print(f"{'':32} {'faces':>7} {'legal':>8} {'asked':>8} {'new':>8} {'balance':>8}")
    found = {}
    for name, (x, y) in ({"held-out faces": held_out} | sets).items():
        row = found[name] = judge(x, y, known)
        worst = max(CHOSEN, key=row["balance"].get)
        print(f"{name[-32:]:32} {len(x):7} {row['legal']:8.2%} {row['asked']:8.2%} "
              f"{row['new']:8.2%} {row['balance'][worst]:8.3f}, the {worst}", flush=True)
    print("\nbalance of each part and paint, and in how many faces the part could be read:")
    for name in CHOSEN:
        cells = [f"{row['balance'][name]:8.3f} " + (f"{row['read'][name]:8.2%}" if name in PARTS
                 else " " * 8) for row in found.values()]
        print(f"{name:12}" + "".join(cells), flush=True)
