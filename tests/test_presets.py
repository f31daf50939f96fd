"""The presets in config/ run, on a few pictures."""

import re

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, checkpoint, here


@pytest.mark.slow
def test_the_preset_for_cifar10_runs(tmp_path):
    """The whole model, on a few pictures of its size."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", pictures)
    args = ["config/cifar10.py", "--dataset=few.npz", "--max_iters=2", "--batch_size=2"]
    args += ["--log_interval=1", "--sampler=euler", "--sample_steps=1", "--device=cpu"]
    printed = here("ddpm", *args, cwd=tmp_path)
    assert "35,746,307 parameters" in printed and "iteration 2 of 2" in printed
    state = checkpoint(tmp_path / "out" / "cifar10")
    assert state["config"]["t_uniform"] == 1
    assert state["config"]["muon"] is False and "exp_avg" in state["optimizer"]["state"][0]
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["cfm", "ddpm"])
def test_the_preset_for_ten_minutes_runs_and_its_plan_adds_up(script, tmp_path):
    """Two iterations on a CPU. The FLOPs in its text are the model's."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", pictures, np.arange(20) % 10)
    args = ["config/cifar10_fast.py", "--dataset=few.npz", "--max_iters=2", "--batch_size=2"]
    args += ["--log_interval=1", "--sample_steps=1", "--device=cpu"]
    printed = here(script, *args, cwd=tmp_path)
    assert "iteration 2 of 2" in printed and "10 classes" in printed
    forward = float(re.search(r"parameters, ([\d.]+) MFLOP", printed)[1]) * 1e6
    text = (ROOT / "config" / "cifar10_fast.py").read_text()
    assert f"{forward / 1e9:.1f} GFLOP a picture" in text
    batch_size, max_iters = (int(re.search(rf"\n{name} = (\d+)", text)[1])
                             for name in ("batch_size", "max_iters"))
    step = 3 * batch_size * forward
    assert f"takes {step / 1e12:.1f} TFLOP" in text
    assert f"take {max_iters * (step + 1e12) / 150e12 / 60:.1f} minutes" in text
    config = checkpoint(tmp_path / "out" / "cifar10-fast")["config"]
    assert config["muon"] and config["flip"] and config["decay_lr"] and config["sampler"] == "dpm++"


def save_few_digits(file):
    """Twenty pictures of MNIST's size."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8)
    np.savez(file, pictures, np.arange(20) % 10)


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_the_preset_for_an_hour_runs(script, tmp_path):
    """The whole model, on a few pictures of its size."""
    save_few_digits(tmp_path / "few.npz")
    args = ["config/mnist_hour.py", "--dataset=few.npz", "--max_iters=2"]
    args += ["--log_interval=1", "--sample_steps=1", "--device=cpu"]
    printed = here(script, *args, cwd=tmp_path)
    assert "654,180 parameters" in printed and "iteration 2 of 2" in printed
    config = checkpoint(tmp_path / "out" / script)["config"]
    assert config["channels"] == 32 and config["label_dropout"] == 0


def test_the_preset_for_colour_pictures_runs_on_a_folder(tmp_path):
    """On pictures of another size, some of them transparent. Its text has the model's figures."""
    (tmp_path / "mine").mkdir()
    x = np.random.default_rng(0).integers(0, 256, (30, 48, 40, 4), dtype=np.uint8)
    for i, pixels in enumerate(x):
        Image.fromarray(pixels[..., :3 + i % 2]).save(tmp_path / "mine" / f"{i}.png")
    args = ["config/pictures.py", "--dataset=mine", "--max_iters=2", "--batch_size=2"]
    printed = here("cfm", *args, "--log_interval=1", "--sample_steps=1", "--device=cpu", cwd=tmp_path)
    assert "pictures of (3, 32, 32)" in printed and "iteration 2 of 2" in printed
    text = (ROOT / "config" / "pictures.py").read_text()
    parameters, flops = re.search(r"([\d,]+) parameters, ([\d.]+) MFLOP", printed).groups()
    assert f"{parameters} parameters, {float(flops):.0f} MFLOP a picture" in text
    assert checkpoint(tmp_path / "out" / "pictures")["config"]["norm_groups"] == 1


@pytest.mark.parametrize("script, sampler", [("ddpm", "ddim"), ("cfm", "euler")])
def test_the_textbooks_presets_run_with_plain_adam_and_uniform_times(script, sampler, tmp_path):
    """On a few pictures, and drawn in one step: the paper's thousand take too long."""
    save_few_digits(tmp_path / "few.npz")
    args = [f"config/textbook_{script}.py", "--dataset=few.npz", "--max_iters=2"]
    args += ["--log_interval=1", f"--sampler={sampler}", "--sample_steps=1", "--device=cpu"]
    assert "iteration 2 of 2" in here(script, *args, cwd=tmp_path)
    state = checkpoint(tmp_path / "out" / f"textbook-{script}")
    config, group = state["config"], state["optimizer"]["param_groups"][0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 0, 2e-3)
    assert "exp_avg_sq" in state["optimizer"]["state"][0] and config["muon"] is False
    assert config["t_uniform"] == 1 and config["grad_clip"] == 0
    expected = {"ddpm": {"prediction": "eps", "schedule": "linear"}, "cfm": {"path": "icfm"}}
    assert config.items() >= expected[script].items()


def test_the_preset_for_cifar10_on_a_cpu_runs(tmp_path):
    """Two iterations, in bfloat16. Its text has the model's figures."""
    pictures = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", pictures, np.arange(120) % 10)
    args = ["config/cifar10_cpu.py", "--dataset=few.npz", "--max_iters=2", "--batch_size=2"]
    printed = here("cfm", *args, "--log_interval=1", "--sample_steps=1", "--device=cpu", cwd=tmp_path)
    assert "cpu, bfloat16" in printed and "iteration 2 of 2" in printed
    text = (ROOT / "config" / "cifar10_cpu.py").read_text()
    parameters, flops = re.search(r"([\d,]+) parameters, ([\d.]+) MFLOP", printed).groups()
    assert f"{parameters} parameters, {float(flops):.0f} MFLOP a picture" in text
    config = checkpoint(tmp_path / "out" / "cifar10-cpu")["config"]
    assert config["flip"] and config["conditional"] and config["label_dropout"] == 0.1
