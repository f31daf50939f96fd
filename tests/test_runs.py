"""The scripts and sample.py, run in small: what they leave, draw, resume and refuse."""

import csv
import functools
import math
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import TINY, checkpoint, flat, here, refused, run_here, sample, stop_after
from PIL import Image

slow = pytest.mark.slow  # see conftest.py


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_training_learns_and_leaves_what_it_promises(script, run_of):
    cwd, printed = run_of(script)
    out = cwd / "out" / script
    left = [".lock", "ckpt-previous.pt", "ckpt.pt", "log.csv", "sample-20.png", "sample-40.png"]
    assert sorted(p.name for p in out.iterdir()) == left
    assert [p.name for p in cwd.iterdir()] == ["out"]
    size = 10 * (8 + 2) + 2  # 8 x 8, and a frame of 2
    assert Image.open(out / "sample-40.png").size == (size, size)
    for expected in (
        f"{script} on synthetic: 9000 pictures of (1, 8, 8), 10 classes",
        "cpu, float32, not compiled",
        "MFLOP a picture",
        str(out),
        "iteration 40 of 40",
        "min left",
        "by quarter of t",
    ):
        assert expected in printed
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(r["iteration"]) for r in rows] == list(range(4, 41, 4))
    held_out = [float(r["held_out"]) for r in rows if r["held_out"]]
    assert (
        len(held_out) == 2
        and held_out[1] < 0.95 * held_out[0]
        and float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    )
    assert checkpoint(out)["iteration"] == 40


@pytest.mark.parametrize(
    "options",
    [
        ["--steps=3"],
        pytest.param(["--guidance=2"], marks=slow),
        pytest.param(["--steps=3", "--clip=false", "--ema=false"], marks=slow),
    ],
)
def test_sampling_with_every_sampler(trained, options):
    """
    The number of evaluations of the model is reported. The last step, to the data, takes a single
    one with ddpm, and so does heun's own last step. The first velocity is known from mean pictures.
    """
    script, cwd = trained
    draw = ["--n_samples=6", "--labels=3,1", "--save=x.npz"]
    stages = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ddim": 1, "dpm++": 1, "dopri5": None}
    own = ("ancestral", "textbook") if script == "ddpm" else ()     # which take all steps of a run
    if own:
        here(script, *TINY, "--max_iters=1", "--n_steps=100", "--out_dir=fewer", cwd=cwd)
    for sampler in [*stages, *own] if own else [*stages, "textbook"]:
        args = [a for a in options if sampler not in ("dopri5", *own) or "steps" not in a]
        run = "fewer" if sampler in own else f"out/{script}"
        out = sample(f"--out_dir={run}", *draw, f"--sampler={sampler}", *args, cwd=cwd)
        arrays = np.load(cwd / "x.npz")
        assert arrays["arr_0"].shape == (6, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [3, 1, 3, 1, 3, 1] and sampler in out
        steps = 3 if "--steps=3" in options else 2
        if sampler in own:
            assert " 100 evaluations" in out
        elif sampler == "textbook":
            assert f" {steps} evaluations" in out
        elif sampler != "dopri5":
            n = stages[sampler]
            single = (script == "ddpm") + (sampler == "heun")  # steps of one evaluation
            assert f" {(steps - single) * n + single - 1} evaluations" in out   # one is known
        (cwd / "x.npz").unlink()


def drawn(*args, cwd):
    """The pictures that sample.py draws, uint8 (N, H, W, C)."""
    sample(*args, "--save=x.npz", cwd=cwd)
    pictures = np.load(cwd / "x.npz")["arr_0"]
    (cwd / "x.npz").unlink()
    return pictures


@pytest.mark.parametrize(
    "sampler, velocities", [("dpm++", 6), ("ddim", 6), ("euler", 6), ("heun", (11, 10))]
)
def test_a_gif_shows_the_way_from_noise_to_the_pictures_of_the_grid(trained, sampler, velocities):
    """A frame for each velocity, the first without the model, and one for the pictures."""
    script, cwd = trained
    if sampler == "heun":
        velocities = velocities[script == "ddpm"]
    draw = [f"--out_dir=out/{script}", "--n_samples=12", f"--sampler={sampler}", "--steps=6"]
    out = sample(*draw, "--batch_size=5", "--save=x.gif", cwd=cwd)
    assert f" {velocities - 1} evaluations" in out and out.endswith(": x.gif\n")
    sample(*draw, "--save=x.png", cwd=cwd)
    with Image.open(cwd / "x.gif") as gif, Image.open(cwd / "x.png") as png:
        assert gif.format == "GIF" and gif.is_animated and gif.n_frames == velocities + 1
        frames, times = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")).astype(float))
            times.append(gif.info["duration"])
        grid = np.asarray(png.convert("RGB")).astype(float)
    assert times[-1] > 2 * max(times[:-1]) and gif.info["loop"] == 0  # the pictures stay a while
    assert {frame.shape for frame in [*frames, grid]} == {(22, 102, 3)}  # two rows, and frames of 2
    gaps = [np.abs(frame - grid).mean() for frame in frames]
    assert gaps[-1] < 4 and gaps[-1] == pytest.approx(min(gaps), abs=0.01)  # a gif has few colours
    noise = frames[0][2:10, 2:10]
    assert gaps[0] > 10 and np.abs(noise - noise.mean()).mean() > 30


def test_guidance_acts_in_its_interval_of_times(trained):
    """An interval with all times changes nothing; one with none would be no guidance: refused."""
    script, cwd = trained
    draw = [f"--out_dir=out/{script}", "--n_samples=6", "--sampler=dpm++", "--steps=8"]
    plain, guided = drawn(*draw, cwd=cwd), drawn(*draw, "--guidance=30", cwd=cwd)
    between, all_times, almost_all = (
        drawn(*draw, "--guidance=30", f"--guidance_interval={interval}", cwd=cwd)
        for interval in ("0.2,0.8", "0,1", "0,0.95")
    )

    def gap(a, b):
        return np.abs(a.astype(int) - b).max()

    assert gap(all_times, guided) == gap(almost_all, guided) == 0
    assert min(gap(plain, guided), gap(between, plain), gap(between, guided)) > 5
    if script == "cfm":                              # half a step counts, too
        half = ["--sampler=midpoint", "--steps=2", "--guidance=30", "--guidance_interval=0.2,0.3"]
        assert gap(drawn(*draw[:2], *half, cwd=cwd), drawn(*draw[:2], *half[:2], cwd=cwd)) > 5
    wrong, message = ["--guidance_interval=0.2,0.8"], "--guidance_interval goes with a --guidance"
    for args in ([], ["--guidance=1"], ["--guidance=3", "--sampler=dopri5"]):
        refused("sample", draw[0], *wrong, *args, cwd=cwd, message=message)


@pytest.mark.parametrize("sampler", [pytest.param("ancestral", marks=slow), "ddim"])
def test_the_same_seed_gives_the_same_pictures_also_where_each_step_adds_noise(trained, sampler):
    script, cwd = trained
    if script == "cfm" and sampler == "ancestral":
        return
    draw = [f"--out_dir=out/{script}", f"--sampler={sampler}", "--n_samples=5"]
    draw += ["--eta=1", "--steps=20"] if sampler == "ddim" else []
    a, b, c = (
        drawn(*draw, f"--seed={seed}", f"--batch_size={n}", cwd=cwd).astype(int)
        for seed, n in ((1, 5), (1, 2), (2, 5))
    )
    assert abs(a - b).max() <= 1 and abs(a - c).max() > 1


def test_dopri5_that_cannot_go_on_says_so_in_one_line(trained):
    script, cwd = trained
    broken = checkpoint(cwd / "out" / script)
    broken["ema"]["conv_out.weight"].fill_(math.nan)
    (cwd / "broken").mkdir(exist_ok=True)
    torch.save(broken, cwd / "broken" / "ckpt.pt")
    args = ["--out_dir=broken", "--sampler=dopri5", "--n_samples=2"]
    refused("sample", *args, cwd=cwd, message="the velocity is not finite")


DDPM_VARIANTS = [
    ["--schedule=cosine", "--prediction=eps", "--weighting=min_snr"],
    ["--schedule=linear", "--prediction=x0", "--weighting=simple"],
    ["--schedule=cosine", "--prediction=v", "--weighting=min_snr"],
    ["--variance=fixedsmall", "--sampler=ancestral", "--n_steps=30"],
    ["--n_steps=2"],
]
CFM_VARIANTS = [
    ["--path=ot", "--sigma=0.1", "--t_uniform=1", "--sampler=dpm++"],
    ["--path=target", "--sigma=0.1", "--t_uniform=0", "--sampler=dpm++"],
    ["--path=vp", "--sigma=0.1", "--t_uniform=1", "--sampler=euler"],
    ["--path=sb", "--sigma=0.1", "--t_uniform=0.5", "--sampler=euler"],
]


@pytest.mark.parametrize(
    "script, options",
    [("ddpm", options) for options in DDPM_VARIANTS]
    + [("cfm", options) for options in CFM_VARIANTS],
)
def test_every_variant_learns_and_samples(script, options, tmp_path):
    if {"--path=ot", "--path=sb"} & set(options):
        pytest.importorskip("scipy")
    train = [*TINY, "--max_iters=40", "--learning_rate=5e-3", *options, "--out_dir=x"]
    here(script, *train, cwd=tmp_path)
    rows = csv.DictReader((tmp_path / "x" / "log.csv").open())
    held_out = [float(r["held_out"]) for r in rows if r["held_out"]]
    assert held_out[1] < held_out[0]
    sampler = "rk4" if script == "cfm" else "dpm++"
    draw = ["--out_dir=x", "--n_samples=4", "--save=x.npz", f"--sampler={sampler}", "--steps=2"]
    out = sample(*draw, cwd=tmp_path)
    assert sampler in out and np.load(tmp_path / "x.npz")["arr_0"].std() > 0
    if changed := other(options[0]):
        args = ["--init_from=resume", "--out_dir=x", changed, "--max_iters=99"]
        refused(script, *args, cwd=tmp_path, message="for good")


def other(option):
    """The same option with another value, if a run cannot change it."""
    name, _, value = option.partition("=")
    values = {"--schedule": "cosine" if value == "linear" else "linear", "--path": "icfm"}
    return f"{name}={values[name]}" if name in values else None


def test_sample_files_and_seeds(trained):
    script, cwd = trained
    draw = ["--out_dir", f"out/{script}", "--n_samples=7"]
    for seed, batch_size, name in ((1, 7, "a.npz"), (1, 3, "b.npz"), (2, 7, "c.npz")):
        sample(*draw, f"--seed={seed}", f"--batch_size={batch_size}", f"--save={name}", cwd=cwd)
    a, b, c = (np.load(cwd / name)["arr_0"].astype(int) for name in ("a.npz", "b.npz", "c.npz"))
    assert abs(a - b).max() <= 1  # the batch size makes no difference,
    assert abs(a - c).max() > 1  # the seed does
    sample(*draw, cwd=cwd)
    assert Image.open(cwd / "out" / script / "samples.png").size == (7 * 10 + 2, 10 + 2)
    sample(*draw, "--ema=false", "--save=pictures", cwd=cwd)
    assert len(list((cwd / "pictures").glob("*.png"))) == 7
    assert Image.open(cwd / "pictures" / "000000.png").size == (8, 8)
    another = {"ddpm": "cfm", "cfm": "ddpm"}[script]  # both kinds of file can be trained on
    data = {"ddpm": "a.npz", "cfm": "pictures"}[script]
    options = ["--max_iters=1", "--channels=8", "--sample_steps=1", "--out_dir=on_samples"]
    here(another, "--dataset", data, *options, cwd=cwd)
    for name in ("a.npz", "b.npz", "c.npz"):
        (cwd / name).unlink()


@pytest.mark.parametrize("script", [pytest.param("ddpm", marks=slow), "cfm"])
def test_a_stopped_and_resumed_run_equals_a_straight_one_bit_for_bit(
    script, tmp_path, monkeypatch
):
    """With everything random switched on, and accumulation; stopped between evaluations."""
    args = [*TINY, "--max_iters=40", "--log_interval=8"]
    args += ["--dropout=0.2", "--flip", "--gradient_accumulation_steps=2"]
    here(script, *args, "--out_dir=straight", cwd=tmp_path)
    with monkeypatch.context() as patch:
        stop_after([27], patch)
        code, out, _ = run_here(script, *args, "--out_dir=stopped", cwd=tmp_path)
    assert code == 128 + signal.SIGTERM and "--init_from=resume" in out
    assert checkpoint(tmp_path / "stopped")["iteration"] == 27
    resume = ["--init_from=resume", "--out_dir=stopped"]  # with the run's own options
    assert "iterations 27 to 40" in here(script, *resume, cwd=tmp_path)
    a, b = (flat(checkpoint(tmp_path / name)) for name in ("straight", "stopped"))
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
    a, b = tmp_path / "straight", tmp_path / "stopped"
    for png in ("sample-20.png", "sample-40.png"):
        assert (a / png).read_bytes() == (b / png).read_bytes()
    a, b = (list(csv.reader((folder / "log.csv").open())) for folder in (a, b))
    assert [r[:3] + r[5:] for r in a] == [r[:3] + r[5:] for r in b]  # all but speed and time
    refused(script, *resume, cwd=tmp_path, message="complete at iteration 40")
    message = "--channels=16: the run in stopped has 8"
    refused(script, *resume, "--channels=16", cwd=tmp_path, message=message)
    another = {"ddpm": "cfm", "cfm": "ddpm"}[script]
    refused(another, *resume, cwd=tmp_path, message=f"is a run of {script}.py")


def test_unconditional(tmp_path):
    for script in ("ddpm", "cfm"):
        train = [*TINY, "--max_iters=1", "--conditional=false"]
        here(script, *train, f"--out_dir={script}", cwd=tmp_path)
        refused(script, *train, "--guidance=2", cwd=tmp_path, message="without labels")
        assert "label.weight" not in checkpoint(tmp_path / script)["model"]
        draw = [f"--out_dir={script}", "--n_samples=2", "--save=x.npz"]
        sample(*draw, cwd=tmp_path)
        assert np.load(tmp_path / "x.npz").files == ["arr_0"]
        refused("sample", draw[0], "--labels=0", cwd=tmp_path, message="the model has none")
        refused("sample", draw[0], "--guidance=2", cwd=tmp_path, message="without labels")
        always = [*TINY, "--max_iters=1", "--label_dropout=0", f"--out_dir=always-{script}"]
        here(script, *always, cwd=tmp_path)
        args = [f"--out_dir=always-{script}", "--guidance=2"]
        refused("sample", *args, cwd=tmp_path, message="needs the unconditional model")


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_evaluation_takes_as_much_memory_as_training_and_batches_make_no_difference(
    script, tmp_path
):
    """At a learning rate of 0 runs differ only in how the same pictures are batched."""
    found = {}
    args = ["--dataset=synthetic", "--image_size=8", "--channels=8", "--device=cpu"]
    args += ["--learning_rate=0", "--max_iters=1"]
    for n in (100, 256):
        here(script, *args, f"--batch_size={n}", f"--out_dir={n}", cwd=tmp_path)
        row = list(csv.reader((tmp_path / str(n) / "log.csv").open()))[1]
        grid = np.asarray(Image.open(tmp_path / str(n) / "sample-1.png"))
        found[n] = [float(v) for v in row[5:]], grid
    assert found[100][0] == pytest.approx(found[256][0], rel=1e-5) and len(found[100][0]) == 5
    assert abs(found[100][1].astype(int) - found[256][1]).max() <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(dtype, tmp_path, monkeypatch):
    """What a GPU runs by default, autocast and the gradient scaler, in the CPU's version."""
    seen, forward = set(), torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v):
        seen.add(q.dtype)
        return forward(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    printed = here("cfm", *TINY, "--max_iters=8", f"--dtype={dtype}", "--out_dir=x", cwd=tmp_path)
    assert f"cpu, {dtype}, " in printed and getattr(torch, dtype) in seen
    assert all(p.dtype == torch.float32 for p in checkpoint(tmp_path / "x")["model"].values())


def test_compile_on_the_cpu(tmp_path, monkeypatch):
    """With the eager backend: tracing and saving are as on a GPU, without minutes of compiling."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    args = [*TINY, "--max_iters=8", "--sample_steps=1"]
    for compile in ("true", "false"):
        said = here("cfm", *args, f"--compile={compile}", f"--out_dir={compile}", cwd=tmp_path)
        assert (", compiled" in said) == (compile == "true")
    a, b = (checkpoint(tmp_path / name)["model"] for name in ("true", "false"))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    here("cfm", *TINY, "--max_iters=2", "--out_dir=x", cwd=tmp_path)
    before = (tmp_path / "x" / "ckpt.pt").read_bytes()
    resume = ["--init_from=resume", "--out_dir=x", "--max_iters=40"]
    code, _, err = run_here("cfm", *resume, "--learning_rate=1e30", "--grad_clip=0", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "not finite" in err
    assert (tmp_path / "x" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("cfm", ["--sigmaa=1"], "did you mean sigma?"),
        ("cfm", ["--sigma=-1"], "--sigma: -1.0 is not between 0 and inf"),
        (
            "cfm",
            ["--sampler=ancestral"],
            "--sampler=ancestral is not one of euler, midpoint, heun, rk4, dopri5, ddim, dpm++, textbook",
        ),
        ("cfm", ["--init_from=resume"], "no valid checkpoint"),
        ("cfm", ["--path=sb"], "a Schroedinger bridge needs a sigma above 0"),
        (
            "cfm",
            ["--path=vp", "--sampler=dpm++"],
            "--sampler=dpm++ is for straight paths, and this one is curved: use --sampler=euler",
        ),
        ("ddpm", ["--prediction=score"], "expected eps, x0, v, not 'score'"),
        ("ddpm", ["--n_steps=1"], "--n_steps: 1 is not between 2"),
        ("ddpm", ["--batch_size=0"], "0 is not between 1"),
        ("ddpm", ["--device=gpu"], "--device=gpu cannot be used here"),
        ("cfm", ["--dataset=mnits"], "--dataset=mnits: not one of"),
        ("cfm", ["--dataset=synthetic", "--attention_levels=7"], "levels go from 0 to 2"),
        ("sample", [], "no valid checkpoint out/cfm/ckpt.pt"),
        ("sample", ["--n_samples=0"], "0 is not between 1"),
    ],
)
def test_mistakes_are_explained_in_one_line(script, args, message, tmp_path):
    refused(script, *args, cwd=tmp_path, message=message)


def test_pairing_without_scipy_is_refused_in_training_but_not_in_sampling(tmp_path, monkeypatch):
    args = [*TINY, "--max_iters=1", "--sigma=0.5", "--out_dir=x"]
    here("cfm", *args, cwd=tmp_path)
    state = checkpoint(tmp_path / "x")
    state["config"]["path"] = "ot"
    torch.save(state, tmp_path / "x" / "ckpt.pt")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    message = "cfm.py: optimal pairing of noise and data needs scipy: pip install scipy"
    refused("cfm", *args, "--path=ot", "--overwrite", cwd=tmp_path, message=message)
    sample("--out_dir=x", "--n_samples=2", cwd=tmp_path)
    refused("sample", "--out_dir=x", "--sampler=ddim", "--eta=1",
            cwd=tmp_path, message="independent of the data")


def test_what_is_there_is_not_overwritten_and_damage_is_told(trained):
    script, cwd = trained
    refused(script, *TINY, cwd=cwd, message="--overwrite")
    draw = ["sample", f"--out_dir=out/{script}"]
    refused(*draw, "--sampler=dpm", cwd=cwd, message="--sampler=dpm is not one of")
    refused(*draw, "--labels=10", cwd=cwd, message="the model has 0 to 9")
    (cwd / "damaged").mkdir(exist_ok=True)
    whole = (cwd / "out" / script / "ckpt.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"something else"):
        (cwd / "damaged" / "ckpt.pt").write_bytes(content)
        resume = ["--init_from=resume", "--out_dir=damaged"]
        refused(script, *resume, cwd=cwd, message="no valid checkpoint")
    refused("sample", "--out_dir=damaged", cwd=cwd, message="no valid checkpoint")
    shutil.rmtree(cwd / "damaged")
