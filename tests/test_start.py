"""What a run keeps for drawing: mean pictures, for the first step, and its early weights."""

import pytest
import torch
from exact import TWO, exact_cfm, exact_ddpm
from helpers import TINY, here, sample

from cfm import PATHS, VelocityField, draw_times
from core.checkpoint import in_half, load_checkpoint, save_checkpoint
from core.pictures import Data
from ddpm import DenoiseDiffusion
from sample import draw, flow

MEANS = torch.tensor([0.1, -0.5, 0.7]).reshape(3, 1, 1, 1)


def fail_if_called(t, x, y):
    raise AssertionError("the model was called")


def ramps(counts):
    """Data with so many pictures of each label, from -1 up, whose pixels are all 50 (label + 2)."""
    y = torch.repeat_interleave(torch.arange(len(counts)) - 1, torch.tensor(counts))
    x = (50 * (y + 2)).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).clone()
    x[..., 0] = 0                                            # the left column is black
    return Data((x, y), (x[:1], y[:1]), [str(i) for i in range(len(counts) - 1)], 0)


def test_means_are_those_of_each_class_and_of_what_has_no_label():
    means = ramps([200, 100, 300]).means(label_dropout=0.5)
    assert means.shape == (3, 1, 4, 4) and means.dtype == torch.float32
    levels = (means + 1) * 127.5
    assert levels[1, 0, :, 1:].allclose(torch.tensor(100.0))
    assert levels[2, 0, :, 1:].allclose(torch.tensor(150.0))
    # unlabelled ones, and half of the others: (200 * 50 + 50 * 100 + 150 * 150) / 400
    assert levels[0, 0, :, 1:].allclose(torch.tensor(93.75))
    assert (means[..., 0] == -1).all()


def test_means_of_mirrored_pictures_are_symmetric():
    means = ramps([0, 100]).means(0.1, flip=True)
    levels = (means[1, 0, 0] + 1) * 127.5
    assert levels.allclose(torch.tensor([50.0, 100.0, 100.0, 50.0]))


def test_no_means_of_few_pictures():
    assert ramps([0, 100, 99]).means(0.1) is None
    assert ramps([99]).means() is None and ramps([100]).means() is not None


@pytest.mark.parametrize("method", [exact_cfm(TWO), exact_ddpm(TWO, schedule="cosine")])
def test_the_flow_starts_towards_the_mean_picture(method):
    """Of a mixture whose model is known exactly, the mean gives the same velocity at tau = 0."""
    z = torch.linspace(-2, 2, 33)[:, None]
    tau = 0.0 if isinstance(method, VelocityField) else method.taus[-1]
    by_model = flow(method)(tau, z)
    method.means = torch.tensor([[sum(weight * mean for weight, mean, _ in TWO)]])
    assert flow(method)(tau, z).allclose(by_model, atol=1e-3)
    assert not flow(method)(0.5, z).allclose(method.means - z, atol=0.1)


def test_labels_and_guidance_choose_the_mean():
    method = VelocityField(fail_if_called, PATHS["icfm"](0.0))
    method.means, z, y = MEANS, torch.zeros(3, 1, 2, 2), torch.tensor([-1, 0, 1])

    def start(**options):
        return flow(method, **options)(0.0, z)[:, 0, 0, 0]

    assert start().allclose(torch.tensor([0.1, 0.1, 0.1]))
    assert start(y=y).allclose(torch.tensor([0.1, -0.5, 0.7]))
    assert start(y=y, guidance=2.0).allclose(torch.tensor([0.1, -1.1, 1.3]))
    assert start(y=y, guidance=0.0).allclose(torch.tensor([0.1, 0.1, 0.1]))
    later = {"guidance": 2.0, "interval": (0.5, 1.0)}        # guidance does not act at 0
    assert start(y=y, **later).allclose(torch.tensor([0.1, -0.5, 0.7]))


def test_the_first_step_is_clipped_if_asked_to_be():
    method = DenoiseDiffusion(fail_if_called, schedule="cosine")
    method.means, z, y = MEANS, torch.zeros(1, 1, 2, 2), torch.tensor([1])
    clipped, free = (flow(method, y, guidance=2.0, clip=clip)(0.0, z) for clip in (True, False))
    assert clipped.max() == 1 and free.max().item() == pytest.approx(1.3)


@pytest.mark.parametrize("path, sigma", [("ot", 0.0), ("icfm", 0.1), ("vp", 0.0), ("sb", 0.5)])
def test_paths_whose_first_velocity_is_another_one_ask_the_model(path, sigma):
    method = VelocityField(fail_if_called, PATHS[path](sigma))
    method.means = MEANS
    with pytest.raises(AssertionError, match="was called"):
        flow(method)(0.0, torch.zeros(1, 1, 2, 2))


def test_a_schedule_that_ends_in_visible_data_asks_the_model():
    method = DenoiseDiffusion(fail_if_called, schedule="linear")
    method.means = MEANS
    with pytest.raises(AssertionError, match="was called"):
        draw(method, torch.zeros(1, 1, 2, 2))


def test_the_first_step_costs_no_evaluation(trained):
    script, cwd = trained
    out = sample(f"--out_dir=out/{script}", "--steps=6", "--n_samples=10", cwd=cwd)
    assert " 5 evaluations of the model" in out
    path = cwd / "out" / script / "ckpt.pt"
    content = load_checkpoint(path)
    assert content["means"].shape == (11, 1, 8, 8)
    save_checkpoint(path, **content | {"means": None})       # as in checkpoints of old
    out = sample(f"--out_dir=out/{script}", "--steps=6", "--n_samples=10", cwd=cwd)
    assert " 6 evaluations of the model" in out


def test_a_run_keeps_its_averages_of_a_quarter_of_the_way(tmp_path):
    args = [*TINY, "--max_iters=12", "--eval_interval=2", "--out_dir=a"]
    here("cfm", *args, cwd=tmp_path)
    early = load_checkpoint(tmp_path / "a" / "ckpt.pt")["early"]
    assert all(v.dtype == torch.float16 for v in early.values())

    # the same run to iteration 4, of 12: after a quarter, but at the first evaluation after it
    here("cfm", *args, "--out_dir=c", "--eval_interval=4", cwd=tmp_path)
    again = load_checkpoint(tmp_path / "c" / "ckpt.pt")
    assert all(torch.equal(v, again["early"][name]) for name, v in early.items())
    assert any(not torch.equal(v, in_half(again["ema"])[name]) for name, v in early.items())


def test_a_resumed_run_keeps_its_early_weights(tmp_path):
    args = [*TINY, "--max_iters=8", "--eval_interval=4", "--decay_lr=false"]
    here("ddpm", *args, cwd=tmp_path)
    early = load_checkpoint(tmp_path / "out" / "ddpm" / "ckpt.pt")["early"]
    here("ddpm", "--init_from=resume", "--max_iters=16", cwd=tmp_path)
    after = load_checkpoint(tmp_path / "out" / "ddpm" / "ckpt.pt")
    assert after["iteration"] == 16 and early
    assert all(torch.equal(v, after["early"][name]) for name, v in early.items())


def test_small_batches_get_their_share_of_uniform_times():
    torch.manual_seed(0)
    for n in (1, 4, 26):
        late = torch.cat([draw_times(n, -5, 0.02) for _ in range(50_000 // n)]) > 0.5
        assert late.float().mean().item() == pytest.approx(0.01, abs=0.0015)
