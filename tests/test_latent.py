"""Pictures to noise and back, and between two noises: examples/latent.py."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import TWO, exact_cfm, exact_ddpm
from helpers import ROOT, TINY, checkpoint, here, lines, refused, run_here, wrong
from PIL import Image

from sample import draw

sys.path.insert(0, str(ROOT / "examples"))
from latent import encode, slerp

PAGE = "examples/latent"
METHODS = {
    "cfm": lambda: exact_cfm(TWO),
    "ddpm": lambda: exact_ddpm(TWO),
    "ddpm cosine": lambda: exact_ddpm(TWO, schedule="cosine"),
    "ddpm x0": lambda: exact_ddpm(TWO, prediction="x0"),
    "ddpm v": lambda: exact_ddpm(TWO, prediction="v"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options",
    [{"sampler": "rk4", "steps": 40}, {"sampler": "dopri5", "atol": 1e-5, "rtol": 1e-5}],
)
def test_to_noise_and_back(name, options):
    method, x = METHODS[name](), torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2)
    noise = encode(method, x, **options)
    again = draw(method, noise, clip=False, **options)
    assert (again - x).abs().max() < 2e-3 < (noise - x).abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_euler_too_leads_to_noise_and_back(name):
    """The model of ddpm is called only at times that it knows."""
    method, x = METHODS[name](), torch.linspace(-0.8, 0.8, 20).reshape(5, 1, 2, 2)
    noise = encode(method, x, sampler="euler", steps=40)
    again = draw(method, noise, sampler="euler", steps=40, clip=False)
    assert torch.isfinite(noise).all() and (again - x).abs().max() < 0.1


def test_slerp_keeps_noise_noise():
    a, b = torch.randn(2, 1, 64, 64)
    assert torch.equal(slerp(a, b, 0), a) and torch.allclose(slerp(a, b, 1), b, atol=1e-6)
    for share in (0.25, 0.5, 0.75):
        assert slerp(a, b, share).std().item() == pytest.approx(1, abs=0.05)
        assert ((1 - share) * a + share * b).std().item() < 0.85


# ---- the command ----

def test_interpolation_is_between_two_noises_and_reconstruction_restores(trained):
    script, cwd = trained
    draw = [f"--out_dir=out/{script}", "--sampler=rk4", "--steps=5"]
    here(PAGE, *draw, "--save=x.npz", "--n_samples=20", cwd=cwd)
    x, y = np.load(cwd / "x.npz").values()
    assert y.tolist() == [0] * 10 + [1] * 10  # a row from one noise to another, of the same class
    x = x.astype(float)
    steps, ends = np.abs(np.diff(x[:10], axis=0)).mean(), np.abs(x[0] - x[9]).mean()
    assert 0 < steps < ends / 3 and np.abs(x[9] - x[10]).mean() > 2 * steps
    here(PAGE, *draw, "--save=x.npz", "--n_samples=20", "--labels=3", "--batch_size=7", cwd=cwd)
    assert np.load(cwd / "x.npz")["arr_1"].tolist() == [3] * 20
    (cwd / "x.npz").unlink()
    restore = [f"--out_dir=out/{script}", "--task=reconstruct", "--n_samples=30"]
    out = here(PAGE, *restore, "--batch_size=20", cwd=cwd)
    assert "rk4, 20 steps" in out and float(out.split("reconstructed to ")[1].split()[0]) < 1
    # there and back; ddpm's step next to the data takes one, and the noise is known from its mean
    assert f" {2 * 20 * 4 - 2 if script == 'cfm' else 2 * (19 * 4 + 1) - 2} evaluations" in out
    with Image.open(cwd / "out" / "latent.png") as grid:
        assert grid.size == (10 * 10 + 2, 6 * 10 + 2)  # 30 held-out pictures, each beside its own
        grid = np.asarray(grid.convert("L"))
    cells = [grid[2:10, 2 + 10 * i:10 + 10 * i].astype(int) for i in range(4)]
    assert abs(cells[0] - cells[1]).max() <= 3 < abs(cells[1] - cells[2]).max()
    for args, message in (
        (["--task=reconstruct", "--labels=1"], "the held-out pictures' own labels"),
        (["--task=reconstruct", "--n_samples=1001"], "only 1000 are held out"),
    ):
        refused(PAGE, f"--out_dir=out/{script}", *args, cwd=cwd, message=message)


@pytest.mark.parametrize("task", ["interpolate", "reconstruct"])
def test_dopri5_that_cannot_go_on_says_so_in_one_line(trained, task):
    script, cwd = trained
    broken = checkpoint(cwd / "out" / script)
    broken["ema"]["conv_out.weight"].fill_(math.nan)
    (cwd / "broken").mkdir(exist_ok=True)
    torch.save(broken, cwd / "broken" / "ckpt.pt")
    args = ["--out_dir=broken", f"--task={task}", "--sampler=dopri5", "--n_samples=2"]
    refused(PAGE, *args, cwd=cwd, message="the velocity is not finite")


@pytest.mark.parametrize("page, task", [("latent", "interpolate"), ("latent", "reconstruct"),
                                        ("likelihood", "")])
def test_a_model_that_draws_in_one_step_only_is_refused(trained, page, task):
    script, cwd = trained
    state = checkpoint(cwd / "out" / script)
    limits = {"one": {"steps": (0, 1), "sampler": ["euler"]}, "reflow": {"eta": (0.0, 0.0)}}
    for name, limit in limits.items():  # those of examples/one_step.py
        (cwd / name).mkdir(exist_ok=True)
        torch.save(state | {"limits": limit}, cwd / name / "ckpt.pt")
    args = [f"--task={task}"] * bool(task)
    message = "one draws in one step only"
    refused(f"examples/{page}", "--out_dir=one", *args, cwd=cwd, message=message)
    few = ["--n_samples=2", *["--steps=2"] * (page == "latent" or script == "ddpm")]
    here(f"examples/{page}", "--out_dir=reflow", *args, *few, cwd=cwd)     # that is a flow


@pytest.fixture
def no_trunk(monkeypatch):
    """As when Python starts in another folder: the trunk is not imported, and not on the path."""
    def ours():
        trunk = {"core", *(path.stem for path in ROOT.glob("*.py"))}
        return [name for name in sys.modules if name.split(".")[0] in trunk]

    path = [folder for folder in sys.path if Path(folder).resolve() not in (ROOT, *ROOT.iterdir())]
    monkeypatch.setattr(sys, "path", path)
    before = {name: sys.modules.pop(name) for name in ours()}
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("trained", ["cfm"], indirect=True)
def test_pages_run_from_any_folder(trained, no_trunk):
    script, cwd = trained
    elsewhere = cwd / "elsewhere"
    elsewhere.mkdir()
    args = [f"--out_dir={os.path.join('..', 'out', script)}", "--n_samples=2"]
    here(PAGE, *args, "--steps=2", "--save=x.png", cwd=elsewhere)
    here("examples/likelihood", *args, cwd=elsewhere)
    assert [path.name for path in elsewhere.iterdir()] == ["x.png"]


# ---- the data of a run ----

def test_moved_downloads_are_found_by_an_option(tmp_path):
    here("cfm", *TINY, "--max_iters=1", "--out_dir=run", cwd=tmp_path)
    restore = ["--out_dir=run", "--task=reconstruct", "--n_samples=2"]
    here(PAGE, *restore, "--data_dir=elsewhere", cwd=tmp_path)


def test_a_moved_set_is_found_by_an_option_and_a_changed_one_is_named(tmp_path):
    for i in range(60):
        path = tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (3 * i, 255 * (i % 2), 7)).save(path)
    options = [option for option in TINY if "dataset" not in option]
    here("cfm", *options, "--dataset=pets", "--max_iters=1", "--out_dir=run", cwd=tmp_path)
    restore = ["--out_dir=run", "--task=reconstruct", "--n_samples=2"]
    here(PAGE, *restore, cwd=tmp_path)
    (tmp_path / "pets").rename(tmp_path / "again")
    for page, args in ((PAGE, restore), ("examples/likelihood", ["--out_dir=run"])):
        code, _, err = run_here(page, *args, cwd=tmp_path)
        assert code == 2 and err.count("\n") == 1
        assert "have moved, say where they are with --dataset" in err
    here(PAGE, *restore, "--dataset=again", cwd=tmp_path)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "again" / "cat" / "new.png")
    for page, args in ((PAGE, restore), ("examples/likelihood", ["--out_dir=run"])):
        code, _, err = run_here(page, *args, "--dataset=again", cwd=tmp_path)
        assert code == 2 and "pictures 60 before, 61 now" in err


WRONG = lines("""
--n_sample=3 | did you mean n_samples?
--out_dir=nowhere | there is no valid checkpoint nowhere/ckpt.pt
--task=train | expected interpolate, reconstruct
--task=likelihood | expected interpolate, reconstruct
--task= | expected interpolate
--n_samples=0 | not between
--steps=-1 | not between 0
--steps=2.5 | expected int
--seed=-1 | not between 0
--sampler=ddim | expected euler, midpoint, heun, rk4, dopri5
--sampler=ancestral | expected euler, midpoint, heun, rk4, dopri5
--sampler=ddim --eta=1 | expected euler, midpoint, heun, rk4, dopri5
--sampler=dopri5 --steps=5 | as many as it needs
--eta=1 | unknown option
--guidance=2 | unknown option
--exact | is no longer an option: see examples/likelihood.py
--task=reconstruct --sampler=ddim | expected euler, midpoint, heun, rk4, dopri5
--task=reconstruct --labels=1 | the held-out pictures' own labels
--labels=10 | the model has 0 to 9
--save=x.gif | must end in .png or .npz
--save=x.gif --task=reconstruct | must end in .png or .npz
--save=pictures | must end in .png or .npz
--save=full.png | must end in .png or .npz, and not be a folder
--device=gpu | cannot be used here
""")


@pytest.mark.parametrize("args, message", WRONG)
@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_wrong_commands(script, args, message, folder, monkeypatch):
    where = "" if "--out_dir" in args else f" --out_dir={script}"
    wrong(PAGE, args + where, message, folder, monkeypatch)


def test_ddpm_takes_no_more_steps_than_it_has(folder, monkeypatch):
    wrong(PAGE, "--out_dir=ddpm --steps=1001", "the run has only 1000", folder, monkeypatch)
