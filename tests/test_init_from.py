"""--init_from=FOLDER: a run that begins with the averaged weights of another."""

import pytest
import torch

from helpers import TINY, checkpoint, here, refused


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_a_run_begins_with_the_averaged_weights_of_another(script, tmp_path):
    """A learning rate of 0 keeps them as they are. Layers that the other run lacks are named."""
    still = [*TINY, "--max_iters=1", "--learning_rate=0", "--label_dropout=0"]
    here(script, *TINY, "--max_iters=20", "--out_dir=first", cwd=tmp_path)
    printed = here(script, *still, "--init_from=first", "--out_dir=second", cwd=tmp_path)
    first, second = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second")
    assert "starting from the weights of first\n" in printed and second["iteration"] == 1
    for state in (second["model"], second["ema"]):
        assert all(torch.equal(state[name], weight) for name, weight in first["ema"].items())

    here(script, *TINY, "--max_iters=1", "--conditional=false", "--out_dir=bare", cwd=tmp_path)
    printed = here(script, *still, "--init_from=bare", "--out_dir=labelled", cwd=tmp_path)
    assert ("starting from the weights of bare, except label.weight; "
            "it was trained with --conditional=False\n") in printed
    bare, labelled = checkpoint(tmp_path / "bare"), checkpoint(tmp_path / "labelled")
    assert all(torch.equal(labelled["model"][name], w) for name, w in bare["ema"].items())
    here(script, "--init_from=resume", "--out_dir=labelled", "--max_iters=2", cwd=tmp_path)

    changed, told = {"ddpm": (["--prediction=eps", "--n_steps=50"], "--n_steps=1000 --prediction=v"),
                     "cfm": (["--path=target", "--muon=false"], "--path=icfm --muon=True")}[script]
    printed = here(script, *still, *changed, "--init_from=first", "--out_dir=other", cwd=tmp_path)
    assert f"starting from the weights of first; it was trained with {told}\n" in printed


@pytest.mark.parametrize("script, other", [("ddpm", "cfm"), ("cfm", "ddpm")])
def test_weights_that_do_not_fit_are_refused(script, other, tmp_path):
    here(script, *TINY, "--max_iters=1", "--out_dir=first", cwd=tmp_path)
    for args, message in [
        (["--channels=16"], "its time.0.weight is (32, 8), here it is (64, 16)"),
        (["--init_from=nowhere"], "--init_from=nowhere is neither scratch nor resume, nor the folder"),
        (["--overwrite", "--out_dir=./first"], "is also the --out_dir: choose another"),
    ]:
        args = ["--out_dir=no", "--init_from=first", *args]
        refused(script, *TINY, *args, cwd=tmp_path, message=message)
    refused(other, *TINY, "--init_from=first", "--out_dir=no", cwd=tmp_path,
            message=f"is a run of {script}.py, not of {other}.py")
