"""
How good are drawn MNIST digits? Two classifiers judge any .npz from sample.py, without a data set.

    python sample.py --out_dir=out/cfm --n_samples=10000 --save=out/cfm/digits.npz
    python bench/quality.py out/cfm/digits.npz        # as many files as you like; two rows for each

The judges come with the project, in assets/judge, so the same file has the same score everywhere.
Both were trained on the first 50,000 training digits. A makes all choices but one. B has
another architecture and seed: it shows what was gained with A's taste alone. A row gives
    distance     squared Frechet distance between the judge's features of the pictures and those of
                 the 10,000 test digits, or with --against=train of the last 10,000 training digits
    x floor      the same as a multiple of the floor: the mean distance of sets of 10,000 training
                 digits to the same digits. The distance itself is in the judge's units, which mean
                 nothing elsewhere
    recognised   the share classified as the digit that was asked for (files with labels)
    counts       how many are classified as a 0, a 1, ... a 9
More, with MNIST in data_dir:
    --training   rows for the first 10,000 training digits, and for the first 1,000 of each class:
                 files with as many of each class are compared with those, as MNIST has more ones
    --coverage   the share of these test digits with a drawn one nearer, in features, than their
                 fifth nearest test digit (Naeem et al. 2020, arXiv 2002.09797)
    --teach=4    the accuracy, on these test digits, of three other classifiers, trained on a file's
                 pictures alone for four epochs: mean and range (Ravuri & Vinyals 2019, arXiv
                 1905.10887: classification accuracy score). It needs labels, but no judge
    --judge=7    instead of A and B, a judge trained now with seed 7, which takes minutes, then kept
                 in data_dir; or --judge=PATH, its file
Fewer than 10,000 pictures are judged too, but the distance then comes out larger: compare equal
numbers. Choose steps, samplers or scales with --against=train, and report the test digits.
"""
import contextlib
import hashlib
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from classifiers import ARCHITECTURES, to_float, train
from configurator import configure, explained, fail
from core.data import load_data
from core.machine import choose_machine
from core.checkpoint import save_checkpoint

# -----------------------------------------------------------------------------
against = "test"             # the test digits; or train, the last 10,000 training digits
training = False             # also judge training digits
coverage = False
teach = 0                    # epochs of the classifiers that learn from the files; 0: none
judge = ""                   # a judge's file, or the seed of one to train; "": A and B
architecture = "plain"       # of the judge to train: plain, as A, or residual, as B
judge_epochs = 12
data_dir = "data"            # holds MNIST, and judges trained here
device = "cpu"
# -----------------------------------------------------------------------------
LIMITS = {"against": ["test", "train"], "architecture": ["plain", "residual"],
          "judge_epochs": (1, math.inf), "teach": (0, math.inf)}
FOLDER = Path(__file__).resolve().parent.parent / "assets" / "judge"
CHECKSUMS = {                # SHA-256 of the judges' files in FOLDER
    "a.pt": "7e695a0094dae3d43840b18544ade0698b4827d96a447ce8e780a59edb27e9c3",
    "b.pt": "18225cf10f9536318d2291b0f59f385998c5399ae3d1648ec44ad4c50cb5c37a",
}


@contextlib.contextmanager
def full_float32():
    """On a GPU without TF32, which could change a score's third digit."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@torch.no_grad()
@full_float32()
def look(network, x, batch_size=1000):
    """(features float64 (N, D), classes (N,)) of pictures x uint8 (N, 1, 28, 28)."""
    features = torch.cat([network.features(to_float(part)) for part in x.split(batch_size)])
    return features.double(), network.classes(features).argmax(1)


def moments(a):
    """Mean (D,) and covariance (D, D) of features (N, D)."""
    return a.mean(0), torch.cov(a.T)


def frechet(a, b):
    """Squared Frechet distance between Gaussians with the moments of a and b, (N, D) each."""
    return frechet_of_moments(*moments(a), *moments(b))


def frechet_of_moments(mean_a, cov_a, mean_b, cov_b):
    """The same, from means (D,) and covariances (D, D)."""
    # the trace of the root of cov_a cov_b, whose eigenvalues are not negative: both are covariances
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * root).item()


def covered_share(real, drawn, k=5):
    """Share of real (N, D) with one of drawn (M, D) as near as the k-th nearest other real one."""
    covered = 0
    for part in real.split(1000):
        radius = torch.cdist(part, real).kthvalue(k + 1).values       # the nearest is itself
        covered += (torch.cdist(part, drawn).min(1).values <= radius).sum().item()
    return covered / len(real)


def score(network, reference, x, y=None):
    """
    (distance, distance / floor, share recognised or nan, counts (10,)) of a judge.

    Pictures x are uint8 (N, 1, 28, 28), labels y (N,) or None; for reference see load_judge().
    """
    features, classes = look(network, x)
    distance = frechet_of_moments(*moments(features), reference["mean"], reference["covariance"])
    recognised = math.nan if y is None else (classes == y).double().mean().item()
    counts = classes.bincount(minlength=10).tolist()
    return distance, distance / reference["floor"], recognised, counts


def teach_pupils(x, y, x_real, y_real, epochs):
    """Accuracies on x_real, y_real of three classifiers trained on the digits x of classes y."""
    accuracies = []
    for seed in range(3):
        pupil = train(x, y, seed, epochs, name=f"pupil {seed}")
        accuracies.append((look(pupil, x_real)[1] == y_real).double().mean().item())
    return accuracies


# ---- judges' files ----

def make_judge(train_split, test_split, architecture="plain", seed=0, epochs=12):
    """
    What a judge's file holds: weights in float16, and what it knows of the digits it compares with.

    Splits are (x uint8 (N, 1, 28, 28), y (N,)). It is trained on the first five sixths of the
    training split. The last sixth is the reference named train, the test split the other.
    """
    parts = list(zip(*(part.chunk(6) for part in train_split)))
    x, y = map(torch.cat, zip(*parts[:-1]))
    network = train(x, y, seed, epochs, architecture)
    weights = {name: w.half() if w.is_floating_point() else w
               for name, w in network.state_dict().items()}
    network.load_state_dict(weights)              # rounded, as everyone will load them
    sets = [look(network, x)[0] for x, _ in parts]

    def reference(x, y, sets):
        features, classes = look(network, x)
        mean, covariance = moments(features)
        return {"mean": mean, "covariance": covariance,
                "floor": sum(frechet(part, features) for part in sets) / len(sets),
                "accuracy": (classes == y).double().mean().item()}

    return {"architecture": architecture, "weights": weights,
            "test": reference(*test_split, sets), "train": reference(*parts[-1], sets[:-1])}


def load_judge(path=FOLDER / "a.pt", device="cpu"):
    """
    (network, references) from a judge's file, by default A's; calls fail() if it is not whole.

    references["test"] and ["train"] are dicts: mean and covariance of the features of the digits
    that others are compared with, the floor, and accuracy, the share that the judge gets right.
    """
    path = Path(path)
    with explained(f"{path}: "):
        content = path.read_bytes()
        known = CHECKSUMS.get(path.name) if path.parent == FOLDER else None
        if known and hashlib.sha256(content).hexdigest() != known:
            raise ValueError("its checksum is wrong, so its scores would be: get the file again")
        kept = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        network = ARCHITECTURES[kept["architecture"]]().to(device).eval()
        network.load_state_dict(kept["weights"])
        return network, {name: kept[name] for name in ("test", "train")}


def load_judges(device):
    """{name: (network, references)}: A and B, or the one that --judge asks for."""
    if not judge:
        return {"A": load_judge(FOLDER / "a.pt", device), "B": load_judge(FOLDER / "b.pt", device)}
    path = judge
    if judge.isdecimal():
        path = Path(data_dir, f"judge-{architecture}-{judge}-{judge_epochs}.pt")
        if not path.exists():
            splits = load_digits(data_dir, device)
            save_checkpoint(path, **make_judge(*splits, architecture, int(judge), judge_epochs))
    return {"own": load_judge(path, device)}


def load_digits(data_dir, device="cpu"):
    """MNIST's training and test split, (x uint8 (N, 1, 28, 28), y (N,)) each, on the device."""
    data = load_data("mnist", data_dir)
    return [(x.to(device), y.to(device)) for x, y in (data.train, data.held_out)]


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
        judges = load_judges(device)
        if training or coverage or teach:
            (x_train, y_train), real = load_digits(data_dir, device)
            x_real, y_real = real if against == "test" else (x_train[-10_000:], y_train[-10_000:])
    if training:
        equal = torch.cat([(y_train == digit).nonzero()[:1000, 0] for digit in range(10)])
        drawn = {"10,000 training digits": (x_train[:10_000], y_train[:10_000]),
                 "1,000 training digits of each class": (x_train[equal], y_train[equal])} | drawn

    compared = "test digits" if against == "test" else "last 10,000 training digits"
    for letter, (_, references) in judges.items():
        print(f"judge {letter} gets {references[against]['accuracy']:.2%} of the {compared} right; "
              f"its floor is {references[against]['floor']:.5f}")
    print(f"{'':40} {'judge':5} {'pictures':>8} {'distance':>9} {'x floor':>8} {'recognised':>10} "
          f"{'coverage' if coverage else ''}  counts")
    for name, (x, y) in drawn.items():
        x, y = x.to(device), None if y is None else y.to(device)
        for letter, (network, references) in judges.items():
            distance, times, recognised, counts = score(network, references[against], x, y)
            covered = ""
            if coverage:
                covered = f"{covered_share(look(network, x_real)[0], look(network, x)[0]):8.2%}"
            print(f"{name[-40:]:40} {letter:5} {len(x):8} {distance:9.5f} {times:8.3f} "
                  f"{recognised:10.2%} {covered}  " + " ".join(map(str, counts)), flush=True)
        if teach and y is not None:
            taught = teach_pupils(x, y, x_real, y_real, teach)
            print(f"{name[-40:]:40} teaches {np.mean(taught):.2%}, "
                  f"{min(taught):.2%} to {max(taught):.2%}", flush=True)
