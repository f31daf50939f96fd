"""
Learned, not memorised? How far drawn pictures are from the nearest training picture.

    pip install -r requirements.txt matplotlib
    python bench/nearest.py out/cfm/digits.npz    # files from sample.py; draws out/nearest.png
    python bench/nearest.py out/cfm/digits.npz out/ddpm/digits.npz --n=1000      # two files, faster
    python bench/nearest.py out/mine/drawn.npz --dataset=path/to/pictures --image_size=32
    python bench/nearest.py out/cifar10/drawn.npz --dataset=cifar10 --flip

For each picture it finds the nearest training picture, by one or two distances:
    pixels       Euclidean, between pixels in [0, 1]
    features     Euclidean, between features of quality.py's judge A, which care less where exactly
                 a stroke lies. Their units mean nothing elsewhere. Of MNIST's digits only
A row of the table gives quantiles of these distances for a set of pictures:
    a file       its first 4,000 pictures (n)
    held-out     the first 4,000; of MNIST, test digits. No model has seen them: a model that has
                 learned draws pictures about as far away, and one that copies draws nearer ones
    training     4,000 at random, the same ones each time. Each is compared with all others. They
                 leave out the last ones, as many as are held out, but a sixth of all at most. The
                 judge has seen MNIST's, but not the test digits
The last column is the share nearer to one of those last training pictures than to one of as many
held-out ones, none of which the judge has seen. It is about a half if nothing was memorised, and
unlike the quantiles it does not depend on the share of simple pictures, such as ones.
The plot shows how many pictures are within each distance. Below are pictures of the first file,
above the nearest training picture and the nearest held-out one, by pixels: on the left the ten that
are nearest to a training picture, on the right its first ten. Of MNIST the ten nearest are mostly
ones, which vary least. The 10% quantile in pixels lies between the ones and the rest, so it depends
on their share: 10% in what sample.py draws, 11% in MNIST.

If a set has fewer than n pictures, the others are cut to its size. Mirrored copies count as far,
unless --flip is given: then the distance is that of a picture or its mirror image.
MNIST takes a minute or two on one CPU core, and 3 GB of memory: 8 bytes for each value of each
picture.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail
from core.data import load_data, read_npz
from core.machine import choose_machine
from core.pictures import visible
from quality import load_digits, load_judge, look

# -----------------------------------------------------------------------------
n = 4000                     # how many pictures of each set
dataset = "mnist"            # what the model was trained on: this and the next three as in cfm.py
data_dir = "data"
image_size = 0
background = "white"
flip = False                 # a mirrored copy is a copy: for runs trained with --flip
picture = "out/nearest.png"
device = "cpu"
# -----------------------------------------------------------------------------
LIMITS = {"n": (1, math.inf), "image_size": (0, math.inf)}
HELD_OUT, TRAINING = "held-out", "training"
QUANTILES = (0.01, 0.1, 0.5, 0.9)


def to_pixels(x):
    """Pictures x uint8 (N, C, H, W) as points: float64 (N, C * H * W) in [0, 1]."""
    return x.flatten(1).double() / 255


def views_of(x, to_points, flip):
    """Pictures x (N, C, H, W) as points, and if flip their mirror images: [(N, D), ...]."""
    return [to_points(view) for view in ([x, x.flip(3)] if flip else [x])]


def nearest(points, train, own=None):
    """
    (distances (N,), indices (N,)) from points (N, D) to the nearest of train (M, D).

    own (N,) are the points' indices in train, if they are among it: each is compared with all
    others. Indices beyond train are of points that are not.
    In float32 the distance of a copy would not be 0, because cdist subtracts large numbers.
    """
    distances, indices = [], []
    for i in range(0, len(points), 250):
        distance = torch.cdist(points[i:i + 250], train)
        if own is not None:
            places = torch.arange(len(train), device=train.device)
            distance.masked_fill_(own[i:i + 250, None] == places, math.inf)
        found = distance.min(1)
        distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def nearest_view(views, train, own=None):
    """As nearest(), of whichever of the views [(N, D), ...] of each picture is nearer."""
    found = [nearest(points, train, own) for points in views]
    distances = torch.stack([distances for distances, _ in found])
    indices = torch.stack([indices for _, indices in found])
    best = distances.min(0)
    return best.values, indices.gather(0, best.indices[None])[0]


def nearer_share(views, train, test, own=None):
    """Share of pictures nearer to one of train than to any of test, as in nearest_view()."""
    to_train, to_test = nearest_view(views, train)[0], nearest_view(views, test, own)[0]
    return (to_train < to_test).double().mean().item()


def show(axis, title, rows, gaps):
    """Pictures side by side, each in a white frame; rows[name] are uint8 (N, C, H, W)."""
    strips = [torch.cat([*F.pad(visible(x, 1), (1, 1, 1, 1), value=255)], 2) for x in rows.values()]
    x = torch.cat(strips, 1).permute(1, 2, 0).cpu().numpy()      # (height, width, channels)
    axis.imshow(x.squeeze(2) if x.shape[2] == 1 else x, cmap="gray", vmin=0, vmax=255)
    height, width = strips[0].shape[1], strips[0].shape[2] / len(gaps)
    axis.set_title(title)
    axis.set_yticks([height * (i + 0.5) for i in range(len(rows))], [*rows])
    axis.set_xticks([width * (i + 0.5) for i in range(len(gaps))], [f"{gap:.2f}" for gap in gaps])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def plot(results, pairs, file):
    """
    A panel for each kind of distance, a line for each set: results[kind][set] are distances.

    Below them are pairs[title] = rows, gaps: see show().
    """
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[5, 3])
    panels = above.subplots(1, len(results), squeeze=False)[0]
    for axis, (kind, sets) in zip(panels, results.items()):
        for name, distances in sets.items():
            style = {HELD_OUT: "k-", TRAINING: "k:"}.get(name, "-")
            share = np.linspace(0, 1, len(distances))
            axis.plot(np.sort(distances.cpu().numpy()), share, style, label=name[-40:])
        axis.set(title=kind, xlabel="distance to the nearest training picture")
        axis.set(xlim=(0, None), ylim=(0, 1))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("share of pictures within it")
    panels[0].legend()
    for axis, (title, (rows, gaps)) in zip(below.subplots(1, len(pairs)), pairs.items()):
        show(axis, title, rows, gaps)
    plt.savefig(file, dpi=80)


if __name__ == "__main__":
    files = [a for a in sys.argv[1:] if a.endswith(".npz") and not a.startswith("--")]
    configure(globals(), LIMITS, [a for a in sys.argv[1:] if a not in files])
    if not files:
        fail("which pictures? Name at least one .npz file from sample.py")
    if not picture.endswith(".png"):
        fail(f"--picture={picture} must end in .png")
    drawn = {}
    for file in files:
        with explained(f"{file}: "):
            drawn[file] = torch.tensor(read_npz(file)[0]).permute(0, 3, 1, 2)
    device, *_ = choose_machine(device)
    with explained("the plot: "):                     # fails before minutes of work
        import matplotlib

        matplotlib.use("Agg")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).touch()
    kinds = {"pixels": to_pixels}
    with explained(f"--dataset={dataset}: "):
        if dataset == "mnist" and image_size in (0, 28):
            judge, _ = load_judge(device=device)
            kinds["features"] = lambda x: look(judge, x)[0]
            (x_train, _), (x_held_out, _) = load_digits(data_dir, device)
        else:
            data = load_data(dataset, data_dir, image_size, background=background).to(device)
            x_train, x_held_out = data.train[0], data.held_out[0]
    for file, x in drawn.items():
        if x.shape[1:] != x_train.shape[1:]:
            fail(f"{file} holds pictures of {tuple(x.shape[1:])}, but --dataset={dataset} "
                 f"of {tuple(x_train.shape[1:])}")

    sets = drawn | {HELD_OUT: x_held_out, TRAINING: x_train}
    unseen = min(len(x_train) // 6, len(x_held_out))
    if unseen < 2:
        fail(f"--dataset={dataset} has too few pictures: {len(x_train)} to train on, "
             f"{len(x_held_out)} held out")
    sizes = {name: len(x) for name, x in sets.items()} | {TRAINING: len(x_train) - unseen}
    shortest = min(sizes, key=sizes.get)
    count = min(n, sizes[shortest])
    if count < n:
        print(f"{count} pictures of each set: {shortest} has no more")
    order = torch.randperm(sizes[TRAINING], generator=torch.Generator().manual_seed(0))
    chosen = order[:count].to(device)
    sets = {name: x[:count].to(device) for name, x in sets.items()}
    sets[TRAINING] = x_train[chosen]

    results, neighbours = {kind: {} for kind in kinds}, {}
    head = [f"{q:.0%}" for q in QUANTILES] + ["nearer to training"]
    print(f"| distance | of {count:,} | " + " | ".join(head) + " |")
    print("|---|---|" + len(head) * "---:|", flush=True)
    for kind, to_points in kinds.items():
        train, held_out = to_points(x_train), to_points(x_held_out)
        for name, x in sets.items():
            views = views_of(x, to_points, flip)
            own = chosen if name == TRAINING else None
            results[kind][name], neighbours[kind, name] = nearest_view(views, train, own)
            quantiles = [results[kind][name].quantile(q).item() for q in QUANTILES]
            own = torch.arange(count, device=device) if name == HELD_OUT else None
            share = nearer_share(views, train[-unseen:], held_out[:unseen], own)
            cells = [kind, name, *(f"{q:.2f}" for q in quantiles), f"{share:.1%}"]
            print("| " + " | ".join(cells) + " |", flush=True)

    first, gaps = sets[files[0]], results["pixels"][files[0]]
    partners = x_train[neighbours["pixels", files[0]]]
    best = gaps.topk(min(10, count), largest=False).indices
    start, pairs = torch.arange(len(best), device=device), {}
    for title, i in (("nearest to a training picture", best), ("the first", start)):
        views = views_of(first[i], to_pixels, flip)
        others = x_held_out[nearest_view(views, to_pixels(x_held_out))[1]]
        rows = {"drawn": first[i], "training": partners[i], "held-out": others}
        pairs[f"{title}, and the distances"] = rows, gaps[i].tolist()
    plot(results, pairs, picture)
    print(f"drew {picture}")
