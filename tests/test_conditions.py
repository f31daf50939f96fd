"""examples/conditions.py: what it measures, a network that takes numbers, and the command."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, here, refused
from PIL import Image

from cfm import classifier_free_guidance
from sample import load_run

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from conditions import ConditionUNet, boldness, look, ranks, slant

EXAMPLE = "examples/conditions"


def bar(width, lean=0.0):
    """A bar (1, 1, 60, 60) of ink, 40 pixels high, that leans to the right by lean pixels a row."""
    x = torch.zeros(1, 1, 60, 60)
    for row in range(10, 50):
        left = round(30 - width / 2 - lean * (row - 29.5))
        x[..., row, left:left + width] = 1
    return x


def test_boldness_and_slant_by_hand():
    for width in (2, 4, 6):  # the outline: 40 on each side, and both ends, less a corner
        ends = 2 * width + 2**0.5 - 2
        assert boldness(bar(width)).item() == pytest.approx(2 * 40 * width / (80 + ends), rel=0.01)
        assert slant(bar(width)).item() == pytest.approx(0, abs=1e-4)
    for lean in (-1.0, 0.5, 1.0):
        assert slant(bar(4, lean)).item() == pytest.approx(lean, rel=0.01)
    thick = torch.cat([bar(2, 0.5), bar(6, 0.5)])
    grey = 0.5 * thick  # half the ink, and half the outline
    assert torch.allclose(boldness(grey), boldness(thick), rtol=1e-4)
    assert torch.allclose(look(2 * thick - 1), torch.stack([boldness(thick), slant(thick)], 1))
    empty = look(torch.full((1, 1, 28, 28), -1.0))
    assert empty.tolist() == [[0, 0]]


def test_ranks_are_the_share_of_the_class_that_is_below():
    among = torch.tensor([[5.0, 1.0, 3.0, 7.0, 9.0], [0.0, 0.0, 0.0, 8.0, 9.0]]).T
    kinds = torch.tensor([2, 2, 2, 2, 0])
    two = torch.tensor([2, 2])
    values = torch.tensor([[0.0, 1.0], [4.0, 9.0]])
    assert ranks(values, two, among, kinds).tolist() == [[0, 0.75], [0.5, 1]]
    assert ranks(values, 0 * two, among, kinds).tolist() == [[0, 0], [0, 0]]
    own = ranks(among, kinds, among, kinds)
    assert own.T.tolist() == [[0.5, 0, 0.25, 0.75, 0], [0, 0, 0, 0.75, 0]]


def test_the_network_starts_as_the_run_it_comes_from_and_hides_what_is_unknown():
    method, _, checkpoint = load_run(ROOT / "assets" / "cfm")
    model = ConditionUNet(2, **checkpoint["model_args"])
    missing, unexpected = model.load_state_dict(method.model.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"numbers"}
    torch.manual_seed(0)
    t, x, kinds = torch.rand(3), torch.randn(3, 1, 28, 28), torch.tensor([3, 0, -1])
    some = torch.tensor([[0.1, 0.9], [0.0, -1.0], [-1.0, -1.0]])
    y = torch.cat([kinds[:, None], some], 1)
    with torch.no_grad():
        expected = method.model(t=t, x=x, y=kinds)
        assert torch.allclose(model(t=t, x=x, y=y), expected, atol=1e-4)
        model.numbers[-1].weight.normal_()
        out = model(t=t, x=x, y=y)
        assert (out - expected).abs().amax((1, 2, 3)).min() > 1e-3
        hidden = torch.where(y < 0, -0.5, y)  # any negative number is unknown
        hidden[:, 0] = kinds
        assert torch.equal(model(t=t, x=x, y=hidden), out)
        zero = torch.where(y < 0, 0, y)  # but 0 is a number
        zero[:, 0] = kinds
        assert ((model(t=t, x=x, y=zero) - out).abs().amax((1, 2, 3)) > 1e-3).tolist() == [
            False, True, True]
        guided = classifier_free_guidance(model, t, x, y, 3.0)
        plain, none = out, model(t=t, x=x, y=torch.full((3, 3), -1.0))
        assert torch.allclose(guided, none + 3 * (plain - none), atol=1e-4)


def save_digits(file, n=40, shape=(28, 28, 1)):
    pixels = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    np.savez(file, pixels, np.arange(n) % 10)


def test_the_page_trains_and_draws_by_its_own_command(tmp_path):
    save_digits(tmp_path / "few.npz", 120)
    few = [f"--init_from={ROOT / 'assets' / 'cfm'}", "--dataset=few.npz", "--batch_size=4"]
    few += ["--steps=2", "--n_samples=4", "--iterations=100", "--device=cpu"]
    printed = here(EXAMPLE, *few, cwd=tmp_path)
    assert Image.open(tmp_path / "out" / "conditions.png").size == (14 * 30 + 2, 10 * 30 + 2)
    assert re.search(r"boldness is off by 0\.\d+ on average, slant by 0\.\d+", printed)


def test_misuse_ends_in_one_line(tmp_path):
    save_digits(tmp_path / "small.npz", shape=(20, 20, 1))
    ddpm, cfm, faces = (f"--init_from={ROOT / 'assets' / run}" for run in ("ddpm", "cfm", "faces"))
    for options, message in [
        ([ddpm], "must be a run of cfm.py"),
        ([cfm, "--dataset=small.npz"], "is not the run's"),
        ([faces], "of one colour"),
        ([cfm, "--dataset=nothing"], "nothing"),
        ([cfm, "--hidden=2"], "--hidden"),
        (["--init_from=nowhere"], "there is no valid checkpoint"),
    ]:
        refused(EXAMPLE, *options, cwd=tmp_path, message=message)
