"""examples/one_step.py: a network that learns where a trained flow carries each noise."""

import re
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "examples" / "one_step.py"
sys.path.insert(0, str(PAGE.parent))
from cfm import ConditionalFlowMatcher, VelocityField
from helpers import TINY, checkpoint, here, refused, sample
from one_step import draw_pairs, pair_loss, renewed
from sample import draw, load_run

SMALL = ["--pool=40", "--fresh=1", "--teacher_steps=2", "--batch_size=8", "--device=cpu"]


def small(args):
    """The arguments of a small run, from the teacher below unless args name another."""
    return [*SMALL, *([] if "--init_from" in str(args) else ["--init_from=out/cfm"]), *args]


def page(*args, cwd):
    return here("examples/one_step", *small(args), cwd=cwd)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny run in out/cfm."""
    cwd = tmp_path_factory.mktemp("teacher")
    here("cfm", *TINY, "--max_iters=20", "--learning_rate=2e-2", cwd=cwd)
    return cwd


def test_the_noise_of_a_pair_leads_to_its_picture(teacher):
    method, _, state = load_run(teacher / "out" / "cfm")
    torch.manual_seed(0)
    x0, x1, y = draw_pairs(method, 300, state["picture_shape"], 10, steps=3)
    assert x0.shape == x1.shape == (300, 1, 8, 8) and abs(x0.std().item() - 1) < 0.05
    assert set(y.tolist()) == set(range(10)) and len(x0.unique(dim=0)) == 300
    some = torch.tensor([0, 17, 260, 299])
    assert torch.allclose(draw(method, x0[some], y[some], "dpm++", 3), x1[some], atol=1e-5)
    _, _, none = draw_pairs(method, 3, state["picture_shape"], 0, steps=1)
    assert none.tolist() == [-1] * 3


def test_new_pairs_replace_the_oldest():
    pairs = [torch.arange(5), 10 * torch.arange(5)]
    pairs = renewed(pairs, [torch.tensor([5, 6]), torch.tensor([50, 60])])
    assert pairs[0].tolist() == [2, 3, 4, 5, 6] and pairs[1].tolist() == [20, 30, 40, 50, 60]
    assert renewed(pairs, [torch.arange(5), torch.arange(5)])[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("t", [0.0, 0.3])
def test_the_target_is_the_difference_of_a_pair_all_along_the_line_between_them(t):
    calls = []

    def model(t, x, y):
        calls.append((t, x, y))
        return torch.zeros_like(x)

    x0, x1, y = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4), torch.arange(8)
    loss = pair_loss(model, x0, x1, y, torch.full((8,), t))
    ((at, x, label),) = calls
    assert (at == t).all() and torch.allclose(x, (1 - t) * x0 + t * x1) and label.equal(y)
    error = (x1 - x0).square().flatten(1).mean(1)
    assert loss.item() == pytest.approx((error / (error + 0.01)).mean().item(), rel=1e-6)


def test_learned_from_pairs_one_step_leads_where_the_flow_does():
    """From exact pairs, with data = 0.3 + 0.5 noise, a linear model learns the flow."""
    torch.manual_seed(0)
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    field = VelocityField(lambda t, x, y: a * x + b, ConditionalFlowMatcher())
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    for _ in range(300):
        x0 = torch.randn(256, 1)
        loss = pair_loss(field.model, x0, 0.3 + 0.5 * x0, None, torch.zeros(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.linspace(-2, 2, 9)[:, None]
    x = draw(field, noise, sampler="euler", steps=1)
    assert torch.allclose(x, 0.3 + 0.5 * noise, atol=0.2)


def test_a_run_begins_with_the_weights_of_its_teacher_and_learns_from_it(teacher):
    """From its own folder, by its own commands, and drawn by sample.py in one evaluation."""
    still = ["--init_from=out/cfm", "--iterations=2", "--learning_rate=0", "--out_dir=still"]
    page(*still, cwd=teacher)
    first, second = checkpoint(teacher / "out" / "cfm"), checkpoint(teacher / "still")
    assert all(torch.equal(second["ema"][name], weight) for name, weight in first["ema"].items())
    assert second["config"]["label_dropout"] == 0 and second["config"]["sample_steps"] == 1
    assert first["means"] is not None and second["means"] is None and not second["early"]
    page("--iterations=100", "--pool=200", cwd=teacher)  # out/one-step is the default

    method, _, state = load_run(teacher / "out" / "cfm")
    torch.manual_seed(9)
    x0, x1, y = draw_pairs(method, 100, state["picture_shape"], 10, steps=2)
    errors = [(load_run(teacher / run)[0].sample(x0, y, steps=1) - x1).square().mean().item()
              for run in ("still", "out/one-step")]
    assert errors[1] < 0.9 * errors[0]

    printed = sample("--out_dir=out/one-step", "--n_samples=4", cwd=teacher)
    assert "dpm++, 1 steps" in printed and "s, 1 evaluations of the model" in printed
    for options in ("--sampler=euler", "--sampler=ddim", "--sampler=textbook", "--steps=1"):
        assert "1 evaluations" in sample("--out_dir=out/one-step", options, cwd=teacher)
    for option, message in [("--steps=2", "out/one-step: --steps: 2 is not between 0 and 1"),
                            ("--sampler=heun", "expected dpm++, ddim, euler, textbook, not 'heun'"),
                            ("--sampler=dopri5", "not 'dopri5'"),
                            ("--guidance=2", "needs the unconditional model")]:
        refused("sample", "--out_dir=out/one-step", option, cwd=teacher, message=message)


def test_a_straighter_flow_takes_any_steps_but_no_new_noise(teacher):
    """Noise that is renewed on the way is not the one that belongs to the picture."""
    page("--reflow", "--iterations=2", "--out_dir=reflow", cwd=teacher)
    for options in (["--steps=1"], [], ["--sampler=heun", "--steps=3"], ["--sampler=ddim"]):
        sample("--out_dir=reflow", "--n_samples=2", *options, cwd=teacher)
    refused("sample", "--out_dir=reflow", "--sampler=ddim", "--eta=1", cwd=teacher,
            message="reflow: --eta: 1.0 is not between 0.0 and 0.0")
    page("--init_from=reflow", "--iterations=1", "--out_dir=then", cwd=teacher)  # both in turn


def test_what_is_no_teacher_is_refused(teacher):
    page("--iterations=1", "--out_dir=taken", cwd=teacher)
    here("ddpm", *TINY, "--max_iters=1", cwd=teacher)
    here("cfm", *TINY, "--max_iters=1", "--path=vp", "--sampler=euler", "--out_dir=vp", cwd=teacher)
    for args, message in [
        (["--init_from=nowhere"], "--init_from=nowhere is neither scratch nor resume, nor the folder"),
        (["--init_from=out/ddpm"], "is a run of ddpm.py, not of cfm.py"),
        (["--init_from=taken"], "draws in one step: give the flow that it learned from"),
        (["--init_from=vp"], "--sampler=dpm++ is for straight paths"),
        (["--out_dir=out/cfm", "--overwrite"], "is also the --out_dir"),
        (["--out_dir=taken"], "taken holds a run"),
        (["--iteratoins=3"], "did you mean iterations?"),
    ]:
        args = small(["--out_dir=no", *args])
        refused("examples/one_step", *args, cwd=teacher, message=message)
    page("--iterations=1", "--out_dir=taken", "--overwrite", cwd=teacher)


def test_its_docstring_names_commands_that_exist():
    commands = re.findall(r"^    python (\S+)", PAGE.read_text(), re.M)
    assert len(commands) >= 4
    assert all((PAGE.parent.parent / command).is_file() for command in commands)
