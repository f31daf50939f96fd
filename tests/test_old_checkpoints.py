"""
A checkpoint of November 2026, from before some options moved to pages of examples/, still draws.

tests/old holds the run, a tiny one of cfm.py with its log, and drawn.npz, four pictures that
sample.py drew from it then.
"""

import csv
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, checkpoint, here, refused, sample

from configurator import RETIRED
from core.checkpoint import load_checkpoint

OLD = ROOT / "tests" / "old"


@pytest.fixture
def old(tmp_path):
    """A copy of the run, and a function that changes an entry of a part of its checkpoint."""
    shutil.copytree(OLD, tmp_path / "old")

    def change(part, name, value):
        content = checkpoint(tmp_path / "old")
        content[part][name] = value
        torch.save(content, tmp_path / "old" / "ckpt.pt")

    return tmp_path, change


def test_it_draws_what_it_drew(old):
    cwd, _ = old
    assert "spans" in checkpoint(cwd / "old")["config"]
    sample("--out_dir=old", "--n_samples=4", "--save=x.npz", cwd=cwd)
    now, then = (np.load(path)["arr_0"].astype(int) for path in (cwd / "x.npz", OLD / "drawn.npz"))
    assert abs(now - then).max() <= 1 and then.std() > 10


def test_it_is_resumed_and_its_log_goes_on(old):
    cwd, _ = old
    here("cfm", "--init_from=resume", "--out_dir=old", "--max_iters=6", cwd=cwd)
    after = checkpoint(cwd / "old")
    assert after["iteration"] == 6 and after["seconds"] > 0
    for part in ("config", "model_args", "data"):
        assert not RETIRED.keys() & after[part].keys()
    rows = list(csv.DictReader((cwd / "old" / "log.csv").open()))
    assert [row["iteration"] for row in rows] == ["3", "6"]
    assert rows[0]["seconds"] == "" and float(rows[0]["held_out"]) > 1
    assert float(rows[1]["seconds"]) > 0 and float(rows[1]["held_out"]) > 0


@pytest.mark.parametrize("part, name, value, page", [
    ("config", "spans", 0.75, "examples/meanflow.py"),
    ("data", "pairs", True, "examples/one_step.py"),
])
def test_what_needs_a_page_now_is_refused_by_its_name(old, part, name, value, page):
    cwd, change = old
    change(part, name, value)
    for script, args in (("sample", []), ("cfm", ["--init_from=resume", "--max_iters=6"])):
        refused(script, "--out_dir=old", *args, cwd=cwd, message=f"see {page}")


@pytest.mark.parametrize("args", [["--task=likelihood"], ["--task", "draw"], ["--atol=1e-5"]])
def test_retired_options_of_the_command_name_the_page_too(old, args):
    cwd, _ = old
    refused("sample", "--out_dir=old", *args, cwd=cwd, message="see examples/likelihood.py")


def test_the_weights_that_come_with_the_project_hold_no_retired_option():
    for method in ("cfm", "ddpm"):
        content = torch.load(ROOT / "assets" / method / "ckpt.pt", weights_only=True)
        for part in ("config", "model_args", "data"):
            assert not RETIRED.keys() & content[part].keys()


def test_a_run_may_have_limits_of_its_own(old):
    """A run drawn in one step, as examples/one_step.py writes it, is refused more of them."""
    cwd, _ = old
    content = checkpoint(cwd / "old")
    content["limits"] = {"steps": (0, 1), "sampler": ["dpm++", "euler"]}
    content["config"]["sample_steps"] = 1
    torch.save(content, cwd / "old" / "ckpt.pt")
    assert "dpm++, 1 steps" in sample("--out_dir=old", "--n_samples=2", "--save=x.npz", cwd=cwd)
    refused("sample", "--out_dir=old", "--steps=2", cwd=cwd,
            message="old: --steps: 2 is not between 0 and 1")
    refused("sample", "--out_dir=old", "--sampler=heun", cwd=cwd,
            message="old: --sampler: expected dpm++, euler, not 'heun'")
    assert load_checkpoint(cwd / "old" / "ckpt.pt")["limits"] == content["limits"]
