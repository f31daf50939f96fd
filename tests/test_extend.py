"""Change one thing, as README says: a schedule, a path, a network, a data set, in one place each."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from helpers import ROOT, TINY

pytestmark = pytest.mark.slow

SIGMOID = '''
def sigmoid_beta(n_steps):
    """alpha_bar falls as a sigmoid, Jabri et al. 2022 (arXiv 2212.11972)."""
    u = torch.linspace(-3, 3, n_steps + 1, dtype=torch.float64)
    f = (-u).sigmoid() - torch.tensor(-3.0).sigmoid() + 1e-4
    return 1 - f[1:] / f[:-1]


'''
PARABOLA = '''
class ParabolicConditionalFlowMatcher(ConditionalFlowMatcher):
    """Slow at the noise, fast at the data, and with a detour: mu_t = t^2 x1 + (1 - t)^2 x0."""
    straight = False

    def compute_mu_t(self, x0, x1, t):
        t = expand_like(t, x0)
        return t**2 * x1 + (1 - t) ** 2 * x0

    def compute_conditional_flow(self, x0, x1, t, xt):
        t = expand_like(t, x0)
        return 2 * t * x1 - 2 * (1 - t) * x0


'''
STRAIGHT = PARABOLA.replace("straight = False", "straight = True").replace("t**2 * x1", "t * x1").replace(
    "(1 - t) ** 2 * x0", "(1 - t) * x0").replace("2 * t * x1 - 2 * (1 - t) * x0", "x1 - x0")
NETWORK = '''

class UNet(nn.Module):
    """Not a UNet: two convolutions with time and class added, and none of its attributes."""

    def __init__(self, in_channels=1, num_classes=0, channels=8, **options):
        super().__init__()
        self.first = nn.Conv2d(in_channels + 1, channels, 3, padding=1)
        self.classes = nn.Embedding(num_classes + 1, channels)
        self.last = nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, t, x, y=None):
        time = t.reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        h = self.first(torch.cat([x, time], 1))
        if y is not None:
            h = h + self.classes(y + 1)[:, :, None, None]
        return self.last(F.silu(h))
'''
UNCOUNTABLE = NETWORK.replace(
    "        time = t",
    "        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:\n"
    "            raise NotImplementedError('a kernel that only runs for real')\n"
    "        time = t")


@pytest.fixture
def project(tmp_path):
    for name in ("ddpm.py", "cfm.py", "unet.py", "sample.py", "configurator.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "core", tmp_path / "core")
    return tmp_path


def insert(file, before, text):
    """Insert text into a file, above the line that starts with before."""
    content = file.read_text()
    assert content.count(f"\n{before}") == 1
    file.write_text(content.replace(f"\n{before}", f"\n{text.lstrip()}{before}"))


def run(project, script, *args, code=0):
    command = [sys.executable, str(project / f"{script}.py"), *args]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def learns(project, script, *args):
    """Train for a few steps, draw with sample.py, and return what the training printed."""
    printed = run(project, script, *TINY, "--max_iters=40", "--learning_rate=5e-3", "--out_dir=x", *args)
    rows = [row.split(",") for row in (project / "x" / "log.csv").read_text().splitlines()[1:]]
    held_out = [float(row[5]) for row in rows if row[5]]
    assert held_out[1] < held_out[0]
    run(project, "sample", "--out_dir=x", "--n_samples=4", "--save=x.npz", "--labels=1,2")
    assert np.load(project / "x.npz")["arr_0"].std() > 0
    return printed


def test_a_schedule(project):
    insert(project / "ddpm.py", "SCHEDULES = {", SIGMOID)
    insert(project / "ddpm.py", "PREDICTIONS = [", 'SCHEDULES["sigmoid"] = sigmoid_beta\n')
    learns(project, "ddpm", "--schedule=sigmoid")
    message = run(project, "ddpm", "--schedule=sigmoidal", code=2)
    assert "expected linear, cosine, log_snr, sigmoid" in message


def test_a_curved_path_is_refused_a_sampler_for_straight_ones_and_drawn_by_others(project):
    insert(project / "cfm.py", "PATHS = {", PARABOLA)
    insert(project / "cfm.py", "CHOICES = {", 'PATHS["parabola"] = ParabolicConditionalFlowMatcher\n')
    for sampler in ("dpm++", "ddim"):
        message = run(project, "cfm", *TINY, "--path=parabola", f"--sampler={sampler}", code=2)
        assert "is for straight paths, and this one is curved: use --sampler=euler" in message
    learns(project, "cfm", "--path=parabola", "--sampler=euler")
    message = run(project, "sample", "--out_dir=x", "--sampler=dpm++", code=2)
    assert "is for straight paths" in message


def test_a_straight_path_is_drawn_by_any_sampler(project):
    insert(project / "cfm.py", "PATHS = {", STRAIGHT)
    insert(project / "cfm.py", "CHOICES = {", 'PATHS["line"] = ParabolicConditionalFlowMatcher\n')
    learns(project, "cfm", "--path=line", "--sampler=dpm++")


@pytest.mark.parametrize("network, counted", [(NETWORK, True), (UNCOUNTABLE, False)])
@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_a_network(project, script, network, counted):
    """If its operations cannot be counted, it trains all the same, and their number is left out."""
    with open(project / "unet.py", "a") as file:
        file.write(network)
    printed = learns(project, script)
    assert ("MFLOP" in printed) == counted and " parameters" in printed


CHECKS = '''
def load_checks(data_dir, size):
    """Chessboards, in two colours."""
    x = torch.zeros(40, 1, size, size, dtype=torch.uint8)
    y = torch.arange(40) % 2
    x[:, :, ::2, ::2] = 255
    x[y == 1] = 255 - x[y == 1]
    return Data((x, y), (x, y), ["white", "black"], checksum=1)


'''


def test_a_data_set(project):
    insert(project / "core" / "data.py", "# Data sets by name", CHECKS)
    insert(project / "core" / "data.py", "@contextlib.contextmanager", 'LOADERS["checks"] = load_checks\n\n\n')
    args = [a for a in TINY if "dataset" not in a] + ["--max_iters=20", "--out_dir=x", "--dataset=checks"]
    assert "checks: 40 pictures of (1, 8, 8), 2 classes\nclasses: white: 20, black: 20" in run(project, "cfm", *args)
    run(project, "sample", "--out_dir=x", "--labels=black,white", "--n_samples=2")
    assert "not one of mnist, fashion_mnist, cifar10, synthetic, faces, checks" in run(
        project, "cfm", *args[:-2], "--out_dir=y", "--dataset=chess", code=2)
