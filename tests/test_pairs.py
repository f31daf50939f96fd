"""Pictures with the noise they were drawn from: kept by sample.py, trained on by both scripts."""

import numpy as np
import pytest
import torch

from cfm import ConditionalFlowMatcher, VelocityField
from core.data import load_data, place
from test_smoke import TINY, checkpoint, flat, here, refused, sample


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with a tiny run in x, and pairs.npz: 60 of its pictures, with their noise."""
    cwd = tmp_path_factory.mktemp("pairs")
    here("cfm", *TINY, "--max_iters=20", "--learning_rate=2e-2", "--out_dir=x", cwd=cwd)
    options = ["--out_dir=x", "--n_samples=60", "--steps=3", "--batch_size=7", "--keep_noise"]
    sample(*options, "--save=pairs.npz", cwd=cwd)
    return cwd


def test_the_noise_that_is_kept_leads_to_its_picture(pairs):
    from sample import draw
    from unet import UNet

    state, arrays = checkpoint(pairs / "x"), np.load(pairs / "pairs.npz")
    assert arrays["noise"].shape == arrays["arr_0"].shape and arrays["noise"].dtype == np.float16
    assert abs(arrays["noise"].astype(float).std() - 1) < 0.05
    model = UNet(**state["model_args"]).eval()
    model.load_state_dict(state["ema"])
    field = VelocityField(model, ConditionalFlowMatcher())
    noise = torch.from_numpy(arrays["noise"]).permute(0, 3, 1, 2).float()
    x = draw(field, noise, torch.from_numpy(arrays["arr_1"]), "dpm++", 3)
    again = (x * 127.5 + 127.5).round().clip(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(again - arrays["arr_0"]).max() <= 1  # noise was rounded to half precision


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [5, 300])
def test_noise_stays_with_its_picture(n, dtype, tmp_path):
    """However they are shuffled and split. Fewer than ten are all in both parts."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, 3, 2, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=x, noise=(x / 64).astype(dtype))  # known from its picture
    data = load_data(str(tmp_path / "x.npz"))
    x_train, y_train, x_val, y_val, noise_train, noise_val = place(data, "cpu")
    assert len(x_train) + len(x_val) == (300 if n == 300 else 10)
    for pictures, noise in [(x_train, noise_train), (x_val, noise_val)]:
        assert noise.dtype == torch.float16 and noise.shape == pictures.shape
        assert torch.equal(noise * 64, pictures.half())
    np.savez(tmp_path / "x.npz", arr_0=x)
    alone = load_data(str(tmp_path / "x.npz"))
    assert place(alone, "cpu")[4:] == [None, None] and torch.equal(alone.train[0], x_train)
    assert alone.checksum != data.checksum


@pytest.mark.parametrize("noise", [
    np.zeros((3, 4, 4, 3), np.float32),
    np.zeros((2, 4, 4, 1), np.float32),
    np.zeros((3, 4, 4, 1), np.uint8),
    np.full((3, 4, 4, 1), np.nan),
    np.full((3, 4, 4, 1), 1e6),  # not finite in half precision
])
def test_noise_that_cannot_belong_to_the_pictures_is_refused(noise, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 4, 4, 1), np.uint8), noise=noise)
    with pytest.raises(ValueError, match="noise must be finite and shaped like arr_0"):
        load_data(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
@pytest.mark.parametrize("option, message", [
    ("--image_size=4", "cannot be resized"),
    ("--flip", "--flip=True does not go with pairs.npz, which has paired noise"),
    ("--path=vp --sampler=heun", "--path=vp does not go"),
    ("--sigma=0.1", "--sigma=0.1 does not go"),
    ("--sampler=ancestral", "--sampler=ancestral does not go"),
])
def test_options_that_would_part_noise_and_pictures_are_refused(script, option, message, pairs):
    only = {"--path": "cfm", "--sigma": "cfm", "--sampler": "ddpm"}.get(option.partition("=")[0], script)
    if script != only:
        pytest.skip(f"an option of {only}.py")
    options = ["--dataset=pairs.npz", *option.split(), "--out_dir=new"]
    refused(script, *options, cwd=pairs, message=message)


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_a_model_of_pairs_draws_with_no_new_noise(script, pairs):
    """Other models may add noise, and so may checkpoints from before there were pairs."""
    where = f"--out_dir=pairs-{script}"
    here(script, *TINY, "--dataset=pairs.npz", "--max_iters=1", where, "--overwrite", cwd=pairs)
    renewing = [["--sampler=ddim", "--eta=1"]] + [["--sampler=ancestral"]] * (script == "ddpm")
    for options in renewing:
        refused("sample", where, *options, cwd=pairs, message="the run was trained on pairs")
    sample(where, "--sampler=ddim", "--n_samples=2", cwd=pairs)
    sample("--out_dir=x", "--sampler=ddim", "--eta=1", "--n_samples=2", cwd=pairs)
    state = checkpoint(pairs / "x")
    assert state["data"].pop("pairs") is False and checkpoint(pairs / where[10:])["data"]["pairs"]
    (pairs / "older").mkdir(exist_ok=True)
    torch.save(state, pairs / "older" / "ckpt.pt")
    sample("--out_dir=older", "--sampler=ddim", "--eta=1", "--n_samples=2", cwd=pairs)


@pytest.mark.parametrize("options", [
    ["--save=x.png"], ["--save=folder"], ["--save=x.npz", "--sampler=ddim", "--eta=1"],
    ["--save=x.npz", "--task=interpolate"], ["--save=x.npz", "--task=reconstruct"]])
def test_noise_is_kept_in_an_npz_and_only_if_it_is_all_there_is(options, pairs):
    refused("sample", "--out_dir=x", "--keep_noise", *options, cwd=pairs, message="--keep_noise goes")


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_training_and_evaluation_take_the_noise_of_each_picture(script, pairs, monkeypatch):
    """The loss gets each picture with the noise that it was saved with."""
    module = __import__(script)
    known = np.load(pairs / "pairs.npz")
    partners = {x.tobytes(): noise for x, noise in zip(known["arr_0"], known["noise"])}
    for name, value in {"batch_size": 16, "label_dropout": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    x_train, y_train, *_, noise_train, _ = place(load_data(str(pairs / "pairs.npz")), "cpu")
    x, y, noise = module.get_batch(x_train, y_train, noise_train)
    assert noise.dtype == torch.float32
    for picture, its in zip((x * 127.5 + 127.5).round().byte(), noise):
        key = picture.permute(1, 2, 0).contiguous().numpy().tobytes()
        assert np.array_equal(its.permute(1, 2, 0).numpy(), partners[key].astype(np.float32))
    assert module.get_batch(x_train, y_train)[2] is None
    shuffled, order = pairs / "shuffled.npz", np.random.default_rng(1).permutation(60)
    np.savez(shuffled, **{name: known[name][order] for name in known if name != "classes"})
    assert load_data(str(shuffled)).checksum == load_data(str(pairs / "pairs.npz")).checksum
    args = [*TINY, "--dataset=pairs.npz", "--learning_rate=0", "--overwrite", f"--out_dir={script}"]
    first = here(script, *args, "--max_iters=2", cwd=pairs)
    assert "60 pictures" not in first and "iteration 2 of 2" in first
    # other noise for the same pictures: different losses, in training and in evaluation
    np.savez(pairs / "other.npz", arr_0=known["arr_0"], arr_1=known["arr_1"], noise=-known["noise"])
    args[args.index("--dataset=pairs.npz")] = "--dataset=other.npz"
    second = here(script, *args, "--max_iters=2", cwd=pairs)
    losses = [[line for line in out.splitlines() if "loss" in line] for out in (first, second)]
    assert len(losses[0]) == len(losses[1]) == 2
    assert all(a.split("; drew")[0].split(", ")[0] != b.split(", ")[0] for a, b in zip(*losses))


@pytest.mark.parametrize("options", [[], ["--spans=0.75", "--sampler=meanflow"]])
def test_a_stopped_run_on_pairs_goes_on_as_if_it_had_not_been(options, pairs):
    args = [*TINY, "--dataset=pairs.npz", "--eval_interval=4", "--overwrite", *options]
    here("cfm", *args, "--max_iters=8", "--decay_lr=false", "--out_dir=once", cwd=pairs)
    here("cfm", *args, "--max_iters=4", "--decay_lr=false", "--out_dir=twice", cwd=pairs)
    resumed = ["--init_from=resume", "--out_dir=twice", "--max_iters=8"]
    here("cfm", *resumed, cwd=pairs)
    once, twice = (checkpoint(pairs / name) for name in ("once", "twice"))
    assert all(torch.equal(a, b) for a, b in zip(flat(once), flat(twice)))
    # the same pictures with other noise count as other data
    known = np.load(pairs / "pairs.npz")
    np.savez(pairs / "other.npz", arr_0=known["arr_0"], arr_1=known["arr_1"], noise=-known["noise"])
    refused("cfm", *resumed[:2], "--max_iters=9", "--dataset=other.npz", cwd=pairs, message="but other pictures")


def test_over_the_whole_way_the_mean_velocity_of_pairs_is_their_difference():
    """Two spans in three go all the way: their target is x1 - x0, without further evaluations."""
    calls = []

    def model(t, x, y):
        calls.append(t)
        return torch.zeros_like(x)

    x0, x1 = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4)
    field = VelocityField(model, ConditionalFlowMatcher(), spans=0.75)
    loss = field.loss(x1, noise=x0)
    t, s = calls[0].unbind(1)
    assert t[2:6].eq(0).all() and s[2:6].eq(1).all() and t[6:].equal(s[6:])
    assert (t[:2] < s[:2]).all()
    assert [len(call) for call in calls] == [8, 2, 2]
    error = (x1 - x0).square().flatten(1).mean(1)  # u = 0, and so is its slope
    assert loss.item() == pytest.approx((error / (error + 0.01)).mean().item(), rel=1e-6)


def test_learned_from_pairs_one_step_leads_where_the_flow_does():
    """From exact pairs, with data = 0.3 + 0.5 noise, a linear model learns the flow."""
    torch.manual_seed(0)
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    field = VelocityField(lambda t, x, y: a * x + b, ConditionalFlowMatcher(), spans=1.0)
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    for _ in range(300):
        x0 = torch.randn(256, 1)
        loss = field.loss(0.3 + 0.5 * x0, noise=x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.linspace(-2, 2, 9)[:, None]
    from sample import draw

    x = draw(field, noise, sampler="meanflow", steps=1)
    assert torch.allclose(x, 0.3 + 0.5 * noise, atol=0.2)


@pytest.mark.parametrize("script", ["ddpm", "cfm"])
def test_a_run_begins_with_the_averaged_weights_of_another(script, pairs):
    """A learning rate of 0 keeps them as they are. Layers that the other run lacks are named."""
    still = [*TINY, "--max_iters=1", "--learning_rate=0", "--label_dropout=0"]
    here(script, *TINY, "--max_iters=20", f"--out_dir={script}-first", cwd=pairs)
    printed = here(script, *still, f"--init_from={script}-first", f"--out_dir={script}-second", cwd=pairs)
    first, second = (checkpoint(pairs / f"{script}-{name}") for name in ("first", "second"))
    assert f"starting from the weights of {script}-first\n" in printed and second["iteration"] == 1
    for state in (second["model"], second["ema"]):
        assert all(torch.equal(state[name], weight) for name, weight in first["ema"].items())
    if script == "cfm":
        printed = here("cfm", *still, f"--init_from={script}-first", "--spans=0.5", "--out_dir=spans", cwd=pairs)
        assert "of cfm-first, except span.0.weight, span.0.bias, span.2.weight, span.2.bias; it was trained with --spans=0.0\n" in printed
        third = checkpoint(pairs / "spans")["model"]
        assert all(torch.equal(third[name], weight) for name, weight in first["ema"].items())
        here("cfm", "--init_from=resume", "--out_dir=spans", "--max_iters=2", cwd=pairs)
    changed, told = {"ddpm": (["--prediction=eps", "--n_steps=50"], "--n_steps=1000 --prediction=v"),
                     "cfm": (["--path=target", "--muon=false"], "--path=icfm --muon=True")}[script]
    printed = here(script, *still, *changed, f"--init_from={script}-first", f"--out_dir={script}-other", cwd=pairs)
    assert f"starting from the weights of {script}-first; it was trained with {told}\n" in printed
    other = {"ddpm": "cfm", "cfm": "ddpm"}[script]
    for args, message in [
        (["--channels=16"], "its time.0.weight is (32, 8), here it is (64, 16)"),
        (["--conditional=false"], "its label.weight is (11, 32), here it is not there"),
        (["--init_from=nowhere"], "--init_from=nowhere is neither scratch nor resume, nor the folder"),
        (["--overwrite", f"--out_dir=./{script}-first"], "is also the --out_dir: choose another"),
    ]:
        args = ["--out_dir=no", f"--init_from={script}-first", *args]
        refused(script, *TINY, *args, cwd=pairs, message=message)
    refused(other, *TINY, f"--init_from={script}-first", "--out_dir=no", cwd=pairs,
            message=f"is a run of {script}.py, not of {other}.py")
