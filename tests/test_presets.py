"""The presets in config/ run, whole, on a few pictures."""

import numpy as np
import pytest

from test_smoke import checkpoint, here


def test_the_preset_for_cifar10_runs(tmp_path):
    """The whole model, on a few pictures of its size."""
    np.savez(tmp_path / "few.npz", np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    args = ["config/cifar10.py", "--dataset=few.npz", "--max_iters=2", "--batch_size=2", "--log_interval=1"]
    printed = here("ddpm", *args, "--sampler=euler", "--sample_steps=1", "--device=cpu", cwd=tmp_path)
    assert "35,746,307 parameters" in printed and "iteration 2 of 2" in printed
    state = checkpoint(tmp_path / "out" / "cifar10")
    assert state["config"]["t_uniform"] == 1
    assert state["config"]["muon"] is False and "exp_avg" in state["optimizer"]["state"][0]


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_the_preset_for_an_hour_runs(script, tmp_path):
    """The whole model, on a few pictures of its size."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", pictures, np.arange(20) % 10)
    args = ["--dataset=few.npz", "--max_iters=2", "--log_interval=1", "--sample_steps=1", "--device=cpu"]
    printed = here(script, "config/mnist_hour.py", *args, cwd=tmp_path)
    assert "654,180 parameters" in printed and "iteration 2 of 2" in printed
    config = checkpoint(tmp_path / "out" / script)["config"]
    assert config["channels"] == 32 and config["label_dropout"] == 0
