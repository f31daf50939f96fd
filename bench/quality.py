"""
How good are drawn MNIST digits? A classifier, trained here once, judges any .npz from sample.py.

    python sample.py --out_dir=out/cfm --n_samples=10000 --save=out/cfm/digits.npz
    python bench/quality.py out/cfm/digits.npz        # as many files as you like; a row for each

The first run trains the classifier: seeded, in minutes on two cores, then kept in data_dir. A row
gives
    distance     squared Frechet distance between the classifier's features of the pictures and
                 those of the 10,000 test images
    x floor      the same as a multiple of the floor: the mean distance of six sets of 10,000
                 training images to the test set. The distance itself is in the classifier's units,
                 which mean nothing elsewhere
    recognised   the share classified as the digit that was asked for (files with labels)
    coverage     the share of test images with a drawn one nearer, in features, than their fifth
                 nearest test image (Naeem et al. 2020, arXiv 2002.09797); the floor's row
                 shows the best to expect
    teaches      with --teach=4: the test accuracy of another classifier, trained on these
                 pictures alone for four epochs (Ravuri & Vinyals 2019, arXiv
                 1905.10887: classification accuracy score). It needs labels, but no judge
    counts       how many are classified as a 0, a 1, ... a 9
The classifier was trained on the floor's pictures, so the floor partly reflects what it
memorised. Fewer than 10,000 pictures are judged too, but the distance then comes out larger:
compare equal numbers.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import configure, explained, fail
from core.data import load_data
from core.machine import choose_machine
from core.run import save_checkpoint

# -----------------------------------------------------------------------------
data_dir = "data"            # holds MNIST, and the classifier once trained
judge_seed = 0               # another seed, another judge: does a result depend on it?
judge_epochs = 6
teach = 0                    # epochs of the classifiers that learn from the files; 0: none
device = "cpu"
# -----------------------------------------------------------------------------
LIMITS = {"judge_epochs": (1, math.inf), "teach": (0, math.inf), "judge_seed": (0, 2**63 - 1)}


class Judge(nn.Module):
    """
    Logits (B, 10) of the ten classes, for pictures (B, 1, 28, 28) in [-1, 1].

    features() is the layer before, (B, 128).
    """

    def __init__(self):
        super().__init__()

        def conv(a, b, stride):
            return [nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(1, 32, 1),
            *conv(32, 64, 2),
            nn.MaxPool2d(2),
            *conv(64, 128, 1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 9, 128),
            nn.ReLU(),
        )
        self.classes = nn.Linear(128, 10)

    def forward(self, x):
        return self.classes(self.features(x))


def to_float(x):
    return x.float() / 127.5 - 1


def jitter(x):
    """Each of the pictures (B, 1, H, W) turned, scaled and shifted a little."""
    turn = 0.2 * (2 * torch.rand(len(x)) - 1)
    scale = 1 + 0.15 * (2 * torch.rand(len(x)) - 1)
    shift = 0.15 * (2 * torch.rand(len(x), 2) - 1)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta.to(x.device), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train(x, y, seed, epochs, batch_size=256, lr=5e-3, name="the judge"):
    """A judge trained on digits x uint8 (N, 1, 28, 28) of classes y (N,)."""
    torch.manual_seed(seed)
    judge = Judge().to(x.device, memory_format=torch.channels_last)
    batch_size = min(batch_size, len(x))
    batches = len(x) // batch_size                # full ones per epoch
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    for epoch in range(epochs):
        for i in torch.randperm(len(x)).to(x.device).split(batch_size)[:batches]:
            loss = F.cross_entropy(judge(jitter(to_float(x[i]))), y[i], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"training {name}: epoch {epoch + 1} of {epochs}, loss {loss.item():.4f}",
              flush=True)
    return judge.eval()


@torch.no_grad()
def look(judge, x):
    """(features float64 (N, 128), classes (N,)) of pictures x uint8 (N, 1, 28, 28)."""
    features = torch.cat([judge.features(to_float(part)) for part in x.split(1000)])
    return features.double(), judge.classes(features).argmax(1)


def frechet(a, b):
    """Squared Frechet distance between Gaussians with the moments of a and b, (N, D) each."""
    return frechet_of_moments(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def frechet_of_moments(mean_a, cov_a, mean_b, cov_b):
    """The same, from means (D,) and covariances (D, D)."""
    # the trace of the root of cov_a cov_b, whose eigenvalues are not negative: both are covariances
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * root).item()


def coverage(real, drawn, k=5):
    """Share of real (N, D) with one of drawn (M, D) as near as the k-th nearest other real one."""
    covered = 0
    for part in real.split(1000):
        radius = torch.cdist(part, real).kthvalue(k + 1).values       # the nearest is itself
        covered += (torch.cdist(part, drawn).min(1).values <= radius).sum().item()
    return covered / len(real)


def load_judge(data_dir, seed=0, epochs=6, device="cpu"):
    """(judge, [MNIST's training set, its test set]): trained now, or loaded from data_dir."""
    data = load_data("mnist", data_dir)
    splits = [(x.to(device), y.to(device)) for x, y in (data.train, data.held_out)]
    path = Path(data_dir, f"judge-{seed}-{epochs}.pt")
    if path.exists():
        judge = Judge().to(device).eval()
        judge.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    else:
        judge = train(*splits[0], seed, epochs)
        save_checkpoint(path, **judge.state_dict())
    return judge, splits


def floors(judge, real, x):
    """Distances of each 10,000 training images of x to the test set, given its features real."""
    return [frechet(look(judge, part)[0], real) for part in x.split(10_000)]


def verdict(judge, real, x, y=None):
    """
    (distance, share recognised or nan, coverage, counts (10,)); real: the test set's features.

    Pictures x are uint8 (N, 1, 28, 28), labels y (N,) or None.
    """
    features, classes = look(judge, x)
    recognised = math.nan if y is None else (classes == y).double().mean().item()
    counts = classes.bincount(minlength=10).tolist()
    return frechet(features, real), recognised, coverage(real, features), counts


def read_pictures(file):
    """(x uint8 (N, 1, 28, 28), y (N,) or None) from an .npz file; calls fail() if it is unfit."""
    with explained(f"{file}: "):
        arrays = np.load(file)
        x = torch.tensor(arrays["arr_0"])
        y = torch.tensor(arrays["arr_1"]) if "arr_1" in arrays else None
    if x.shape[1:] != (28, 28, 1) or x.dtype != torch.uint8 or len(x) < 2:
        fail(f"{file}: arr_0 must be uint8 (N, 28, 28, 1), two at least, "
             f"but is {x.dtype} {tuple(x.shape)}")
    if y is not None and y.shape != x.shape[:1]:
        fail(f"{file}: arr_1 must be a label for each of {len(x)} pictures, "
             f"but is {tuple(y.shape)}")
    if y is not None and (y.is_floating_point() or y.min() < 0 or y.max() > 9):
        fail(f"{file}: arr_1 must be labels from 0 to 9")
    return x.permute(0, 3, 1, 2), y


if __name__ == "__main__":
    files = [a for a in sys.argv[1:] if a.endswith(".npz") and not a.startswith("--")]
    configure(globals(), LIMITS, [a for a in sys.argv[1:] if a not in files])
    drawn = {file: read_pictures(file) for file in files}

    device, *_ = choose_machine(device)
    with explained():
        judge, splits = load_judge(data_dir, judge_seed, judge_epochs, device)
    (x_train, y_train), (x_test, y_test) = splits
    real, classes = look(judge, x_test)
    print(f"the judge gets {(classes == y_test).float().mean():.2%} of the test set right")
    floor = np.mean(floors(judge, real, x_train))
    print(f"{'':40} {'pictures':>8} {'distance':>9} {'x floor':>8} {'recognised':>10} "
          f"{'coverage':>8} {'teaches':>8}  counts")
    sizes = {10_000} | ({min(len(x), len(x_train)) for x, _ in drawn.values()} if teach else set())
    drawn = {f"{n:,} training images": (x_train[:n], y_train[:n]) for n in sorted(sizes)} | drawn
    for name, (x, y) in drawn.items():
        x, y = x.to(device), None if y is None else y.to(device)
        distance, recognised, covered, counts = verdict(judge, real, x, y)
        taught = math.nan
        if teach and y is not None:
            pupil = train(x, y, judge_seed, teach, name=f"on {name}")
            taught = (look(pupil, x_test)[1] == y_test).double().mean().item()
        print(f"{name[-40:]:40} {len(x):8} {distance:9.3f} {distance / floor:8.2f} "
              f"{recognised:10.2%} {covered:8.2%} {taught:8.2%}  " + " ".join(map(str, counts)),
              flush=True)
    print(f"the floor, the mean over six sets of 10,000 training images: {floor:.3f}")
