"""
Learned, not memorised? How far drawn MNIST digits are from the nearest training picture.

    pip install -r requirements.txt matplotlib
    python bench/nearest.py out/cfm/digits.npz    # files from sample.py; draws assets/nearest.png
    python bench/nearest.py out/cfm/digits.npz out/ddpm/digits.npz --n=1000      # two files, faster

For each digit it finds the nearest of the 60,000 training pictures, by two distances:
    pixels       Euclidean, between pixels in [0, 1]
    features     Euclidean, between features of quality.py's judge A, which care less where exactly
                 a stroke lies. Their units mean nothing elsewhere
A row of the table gives quantiles of these distances for a set of digits:
    a file             its first 4,000 digits (n)
    test digits        the first 4,000. No model has seen them: a model that has learned draws
                       digits about as far away, and one that copies draws nearer ones
    training digits    4,000 at random of the first 50,000, the same ones each time. Each is
                       compared with all others. The judge has seen them, but not the test digits
The last column is the share nearer to the last 10,000 training digits than to the 10,000 test
digits, none of which the judge has seen. It is about a half if nothing was memorised, and unlike
the quantiles it does not depend on the share of ones.
The plot shows how many digits are within each distance. Below are the ten digits of the first file
that are nearest to a training picture in pixels, each above that picture. Most are ones, which vary
least. The 10% quantile in pixels lies between the ones and the rest, so it depends on their share:
10% in what sample.py draws, 11% in MNIST.

If a set has fewer than n digits, the others are cut to its size. It takes a minute or two on one
CPU core, and 3 GB of memory.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail
from core.machine import choose_machine
from quality import load_digits, load_judge, look, read_pictures

# -----------------------------------------------------------------------------
n = 4000                     # how many digits of each set
data_dir = "data"            # holds MNIST
picture = "assets/nearest.png"
device = "cpu"
# -----------------------------------------------------------------------------
LIMITS = {"n": (1, math.inf)}
QUANTILES = (0.01, 0.1, 0.5, 0.9)


def to_pixels(x):
    """Pictures x uint8 (N, 1, H, W) as points: float64 (N, H * W) in [0, 1]."""
    return x.flatten(1).double() / 255


def nearest(points, train, own=None):
    """
    (distances (N,), indices (N,)) from points (N, D) to the nearest of train (M, D).

    own (N,) are the points' indices if they are from train: each is compared with all others.
    In float32 the distance of a copy would not be 0, because cdist subtracts large numbers.
    """
    distances, indices = [], []
    for i in range(0, len(points), 250):
        distance = torch.cdist(points[i:i + 250], train)
        if own is not None:
            distance.scatter_(1, own[i:i + 250, None], math.inf)
        found = distance.min(1)
        distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def nearer_share(points, train, test, own=None):
    """Share of points (N, D) nearer to one of train than to any of test; own as in nearest()."""
    return (nearest(points, train)[0] < nearest(points, test, own)[0]).double().mean().item()


def strip(x):
    """Pictures (N, 1, H, W) side by side, each in a white frame: (H + 2, N * (W + 2))."""
    return torch.cat([*F.pad(x, (1, 1, 1, 1), value=255)[:, 0]], 1)


def plot(results, drawn, partners, gaps, file):
    """
    A panel for each kind of distance, a line for each set: results[kind][set] are distances.

    Below them are drawn pictures, each above its training partner, and the gaps between them.
    """
    import matplotlib.pyplot as plt

    layout = [[*results], ["pairs"] * len(results)]
    _, axes = plt.subplot_mosaic(layout, figsize=(10, 6.4), height_ratios=[5, 3])
    for kind, sets in results.items():
        axis = axes[kind]
        for name, distances in sets.items():
            style = {"test digits": "k-", "training digits": "k:"}.get(name, "-")
            share = np.linspace(0, 1, len(distances))
            axis.plot(np.sort(distances.cpu().numpy()), share, style, label=name[-40:])
        axis.set(title=kind, xlabel="distance to the nearest training picture")
        axis.set(xlim=(0, None), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes["pixels"].set_ylabel("share of digits within it")
    axes["pixels"].legend()
    axis = axes["pairs"]
    rows = torch.cat([strip(drawn), strip(partners)]).cpu().numpy()
    axis.imshow(rows, cmap="gray", vmin=0, vmax=255)
    axis.set_title("the drawn digits nearest to a training picture, and their distances in pixels")
    axis.set_yticks([15, 45], ["drawn", "training"])
    axis.set_xticks([15 + 30 * i for i in range(len(gaps))], [f"{gap:.2f}" for gap in gaps])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    plt.tight_layout()
    plt.savefig(file, dpi=80)


if __name__ == "__main__":
    files = [a for a in sys.argv[1:] if a.endswith(".npz") and not a.startswith("--")]
    configure(globals(), LIMITS, [a for a in sys.argv[1:] if a not in files])
    if not files:
        fail("which digits? Name at least one .npz file from sample.py")
    if not picture.endswith(".png"):
        fail(f"--picture={picture} must end in .png")
    drawn = {file: read_pictures(file)[0] for file in files}
    device, *_ = choose_machine(device)
    with explained("the plot: "):                     # fails before minutes of work
        import matplotlib

        matplotlib.use("Agg")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).touch()
    with explained():
        judge, _ = load_judge(device=device)
        (x_train, _), (x_test, _) = load_digits(data_dir, device)

    sets = drawn | {"test digits": x_test, "training digits": x_train}
    shortest = min(sets, key=lambda name: len(sets[name]))
    count = min(n, len(sets[shortest]))
    if count < n:
        print(f"{count} digits of each set: {shortest} has no more")
    unseen = len(x_train) // 6                        # the last ones: as many as test digits
    order = torch.randperm(len(x_train) - unseen, generator=torch.Generator().manual_seed(0))
    chosen = order[:count].to(device)
    sets = {name: x[:count].to(device) for name, x in sets.items()}
    sets["training digits"] = x_train[chosen]

    kinds = {"pixels": to_pixels, "features": lambda x: look(judge, x)[0]}
    results, neighbours = {kind: {} for kind in kinds}, {}
    head = [f"{q:.0%}" for q in QUANTILES] + ["nearer to training"]
    print(f"| distance | of {count:,} | " + " | ".join(head) + " |")
    print("|---|---|" + len(head) * "---:|", flush=True)
    for kind, to_points in kinds.items():
        train, test = to_points(x_train), to_points(x_test)
        for name, x in sets.items():
            points = to_points(x)
            own = chosen if name == "training digits" else None
            results[kind][name], neighbours[kind, name] = nearest(points, train, own)
            quantiles = [results[kind][name].quantile(q).item() for q in QUANTILES]
            own = torch.arange(count, device=device) if name == "test digits" else None
            share = nearer_share(points, train[-unseen:], test, own)
            cells = [kind, name, *(f"{q:.2f}" for q in quantiles), f"{share:.1%}"]
            print("| " + " | ".join(cells) + " |", flush=True)

    gaps, best = results["pixels"][files[0]].topk(min(10, count), largest=False)
    partners = x_train[neighbours["pixels", files[0]][best]]
    plot(results, sets[files[0]][best], partners, gaps.tolist(), picture)
    print(f"drew {picture}")
