"""
The real scripts, run as a user runs them, for a few steps on the CPU. No network is needed.

    python -m pytest test_smoke.py      # this file, under a minute
    python -m pytest                    # this file and tests/, without the slow tests
    python -m pytest --all              # the slow tests too
"""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent
SCRIPTS = ["ddpm", "cfm"]
TINY = (
    "--dataset=synthetic --image_size=8 --channels=8 --batch_size=32 --warmup_iters=4 "
    "--learning_rate=2e-2 --sample_steps=2 --max_iters=40 --log_interval=4 --eval_interval=20"
).split()


def run(script, *args, cwd):
    """What a script prints to stdout. One thread is the fastest for models this small."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *args]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(request, tmp_path_factory):
    """(script, working directory, what was printed) of 40 iterations into the default out_dir."""
    cwd = tmp_path_factory.mktemp(request.param)
    return request.param, cwd, run(request.param, *TINY, "--device=cpu", cwd=cwd)


def test_training_learns_and_leaves_what_it_promises(trained):
    script, cwd, printed = trained
    out = cwd / "out" / script
    left = [".lock", "ckpt-previous.pt", "ckpt.pt", "log.csv", "sample-20.png", "sample-40.png"]
    assert sorted(path.name for path in out.iterdir()) == left
    size = 10 * (8 + 2) + 2              # ten pictures of 8 x 8, in frames of 2
    assert Image.open(out / "sample-40.png").size == (size, size)
    for expected in (
        f"{script} on synthetic: 9000 pictures of (1, 8, 8), 10 classes",
        "cpu, float32, not compiled",
        "iteration 40 of 40",
        "by quarter of t",
        str(out),
    ):
        assert expected in printed
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(row["iteration"]) for row in rows] == list(range(4, 41, 4))
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    first, last = (float(row["held_out"]) for row in rows if row["held_out"])
    assert last < 0.95 * first
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])


def test_drawing(trained):
    script, cwd, _ = trained
    draw = [f"--out_dir=out/{script}", "--n_samples=6", "--labels=3,1", "--device=cpu"]
    printed = run("sample", *draw, "--save=x.npz", cwd=cwd)
    assert f"6 pictures, {script} at iteration 40: dpm++, 2 steps" in printed
    arrays = np.load(cwd / "x.npz")
    assert arrays["arr_0"].shape == (6, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_0"].std() > 10
    assert arrays["arr_1"].tolist() == [3, 1, 3, 1, 3, 1]


def test_a_resumed_run_ends_bit_for_bit_as_if_it_had_not_been_stopped(trained):
    """It goes on from the checkpoint of iteration 20."""
    script, cwd, _ = trained
    straight, resumed = cwd / "out" / script, cwd / "resumed"
    shutil.copytree(straight, resumed)
    os.replace(resumed / "ckpt-previous.pt", resumed / "ckpt.pt")
    printed = run(script, "--init_from=resume", "--out_dir=resumed", cwd=cwd)
    assert "iterations 20 to 40" in printed
    a, b = load(straight / "ckpt.pt"), load(resumed / "ckpt.pt")
    assert a["iteration"] == b["iteration"] == 40
    assert a["config"].keys() == b["config"].keys()
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    grid = "sample-40.png"
    assert (straight / grid).read_bytes() == (resumed / grid).read_bytes()


USES = {
    "ddpm": "from ddpm import DenoiseDiffusion\n"
            "method = DenoiseDiffusion(lambda t, x, y: weight * x, n_steps=10)\n",
    "cfm": "from cfm import ConditionalFlowMatcher, VelocityField\n"
           "method = VelocityField(lambda t, x, y: weight * x, ConditionalFlowMatcher())\n",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_file_copied_into_another_project_works(script, tmp_path):
    """No other file of this project is there, and of all packages only torch is imported."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "weight = torch.ones((), requires_grad=True)\n"
        "x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, -1])\n"
        f"{USES[script]}"
        "method.loss(x, y).backward()\n"
        "drawn = method.sample(torch.randn_like(x), y, steps=10)\n"
        "print(weight.grad.item() != 0, drawn.shape == x.shape)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda(script, tmp_path):
    printed = run(script, *TINY, "--out_dir=x", cwd=tmp_path)
    assert "cuda:0, " in printed and ", compiled" in printed and "float32" not in printed
    assert not any("_orig_mod" in name for name in load(tmp_path / "x" / "ckpt.pt")["model"])
    run(script, "--init_from=resume", "--out_dir=x", "--max_iters=44", cwd=tmp_path)
    run("sample", "--out_dir=x", "--n_samples=2", cwd=tmp_path)
