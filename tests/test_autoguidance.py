"""examples/autoguidance.py: away from the early weights of the same run."""

import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, here, refused, sample
from PIL import Image

from core.checkpoint import load_checkpoint, save_checkpoint
from sample import load_run

sys.path.insert(0, str(ROOT / "examples"))
from autoguidance import Autoguided, load_guided

EXAMPLE = "examples/autoguidance"


def test_the_output_moves_away_from_the_early_weights(trained):
    script, cwd = trained
    folder = cwd / "out" / script
    x, y, t = torch.randn(4, 1, 8, 8), torch.arange(4), torch.full((4,), 0.5)
    good = load_run(folder)[0].model(t=t, x=x, y=y)
    early, same, guided = (load_guided(folder, w)[0].model(t=t, x=x, y=y) for w in (0, 1, 1.5))
    assert not torch.allclose(good, early, atol=1e-3)
    assert torch.allclose(good, same, atol=1e-6)
    assert torch.allclose(guided, early + 1.5 * (good - early), atol=1e-5)


def test_at_scale_1_it_draws_what_sample_draws_and_above_it_does_not(trained):
    script, cwd = trained
    run = [f"--out_dir=out/{script}", "--n_samples=12"]
    sample(*run, "--save=plain.npz", "--steps=4", cwd=cwd)
    drawn = {}
    for scale in (1, 3):
        out = here(EXAMPLE, *run, f"--scale={scale}", "--steps=4", f"--save={scale}.npz",
                   "--batch_size=5", cwd=cwd)
        assert ", 6 evaluations:" in out                        # of the first step none, two a step
        drawn[scale] = np.load(cwd / f"{scale}.npz")
    plain = np.load(cwd / "plain.npz")
    assert (drawn[1]["arr_1"] == plain["arr_1"]).all()
    difference = {s: abs(d["arr_0"].astype(int) - plain["arr_0"]).max() for s, d in drawn.items()}
    assert difference[1] <= 1 < difference[3]


def test_it_draws_a_grid_of_the_labels_asked_for(trained):
    script, cwd = trained
    here(EXAMPLE, f"--out_dir=out/{script}", "--labels=3", "--n_samples=10", "--sampler=heun",
         cwd=cwd)
    assert Image.open(cwd / "out" / "guided.png").size == (10 * 10 + 2, 12)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_pictures_by_every_sampler(trained):
    script, cwd = trained
    for name in ("a", "b"):
        here(EXAMPLE, f"--out_dir=out/{script}", "--sampler=textbook", "--steps=4", "--n_samples=3",
             f"--save={name}.npz", cwd=cwd)
    assert (np.load(cwd / "a.npz")["arr_0"] == np.load(cwd / "b.npz")["arr_0"]).all()


@pytest.mark.parametrize("options, message", [
    ("--save=x.gif", "must end in .png or .npz"),
    ("--sampler=best", "is not one of"),
    ("--labels=cow", "no class cow"),
    ("--scale=-1", "scale"),
])
def test_misuse_ends_in_one_line(trained, options, message):
    script, cwd = trained
    refused(EXAMPLE, f"--out_dir=out/{script}", options, cwd=cwd, message=message)


def test_a_run_without_early_weights_is_refused(trained):
    script, cwd = trained
    path = cwd / "out" / script / "ckpt.pt"
    save_checkpoint(path, **load_checkpoint(path) | {"early": {}})
    refused(EXAMPLE, f"--out_dir=out/{script}", cwd=cwd, message="no early weights")


def test_networks_are_called_by_keyword():
    network = Autoguided(lambda *, x, y, t: 3 * x + t, lambda *, t, x, y: x, 2.0)
    assert network(t=torch.tensor([1.0]), x=torch.tensor([10.0]), y=None).item() == 52
