"""
How good are drawn faces? Each one is read back, part by part, so the figures are exact.

    python cfm.py config/faces.py
    python sample.py --out_dir=out/faces --n_samples=10000 --save=out/faces/faces.npz
    python bench/faces.py out/faces/faces.npz         # as many files as you like; a row for each

A row gives
    legal        the share whose every pixel is within the tolerance of a face that the designs in
                 core/faces.py can make. The tolerance is less than half the smallest distance
                 between two colours that may stand in one place, so that face is the only one.
                 A distance is the largest difference in red, green or blue, of 255
    asked        the share that is of the class asked for: that as which most parts can be read
    new          the share of the legal faces that are not in the training set. Of held-out
                 faces it is what chance gives
    balance      how far the designs of a part, or the colours of a paint, are from as frequent as
                 in the training set: their total variation distance, from 0 to 1, in the legal
                 faces. The row has the largest; a second table has them all, and beside each the
                 share of all faces in which that part could be read. It expects as many faces of
                 one class as of another
With more than a million faces to draw, almost any is new. To see whether a model copies, train it
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
RGB = np.array([*COLOURS.values()])                              # (colours, 3)


def colours_of_letters():
    """
    For each of LETTERS, which colour is which choice of its paint: (letters, colours + 1).

    -1 is none; the last column, where a colour of -1 finds it, holds nothing else.
    """
    names, tables = list(COLOURS), []
    for letters, choices in PAINTS.values():
        for tone, _ in enumerate(letters):
            table = np.full(len(names) + 1, -1, np.int8)
            for choice, colour in enumerate(choices.split()):
                table[names.index(colour.split(",")[tone])] = choice
            tables.append(table)
    return np.stack(tables)


def possible_colours(tables):
    """Which colours may stand in each place: bool (16, 16, colours)."""
    seen = np.stack([BARE, *[letters for part in PARTS.values() for letters in part.values()]])
    possible = np.zeros((SIZE, SIZE, len(RGB)), bool)
    for letters in seen:
        drawn = (letters > 0) | (BARE == 0)                      # a dot shows what is beneath
        possible |= drawn[..., None] & (tables[letters, :-1] >= 0)
    return possible


def smallest_distance(possible):
    """Between two colours that may stand in one place."""
    pairs = {pair for place in possible.reshape(-1, len(RGB))
             for pair in combinations(np.flatnonzero(place), 2)}
    return min(abs(RGB[a] - RGB[b]).max() for a, b in pairs)


TABLES = colours_of_letters()
POSSIBLE = possible_colours(TABLES)
DISTANCE = smallest_distance(POSSIBLE)
TOLERANCE = (DISTANCE - 1) // 2


def read_colours(x):
    """The colour in each place, (N, 16, 16), -1 for none within the tolerance of a possible one."""
    x = x.permute(0, 2, 3, 1).numpy().astype(np.int16)
    found = np.full(x.shape[:3], -1, np.int8)
    for colour, rgb in enumerate(RGB.astype(np.int16)):
        near = (abs(x - rgb) <= TOLERANCE).all(-1) & POSSIBLE[..., colour]
        found[near] = colour
    return found


def read_part(colours, region, letters):
    """
    Which faces have these letters in this region, (N,), and {column: its number (N,)} of paints.

    colours is (N, 16, 16), region and letters are (16, 16).
    """
    fits, paints = np.ones(len(colours), bool), {}
    for letter in np.unique(letters[region]):
        chosen = TABLES[letter][colours[:, region & (letters == letter)]]     # (N, places)
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
    print(f"colours that may stand in one place are {DISTANCE} or more apart: "
          f"a pixel may be off by {TOLERANCE}")
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
