"""examples/inpaint.py, enlarge.py and vary.py: pictures filled in, enlarged and varied."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, here, refused
from PIL import Image

from cfm import ConditionalFlowMatcher, VelocityField
from core.pictures import load_picture
from sample import load_run

PAGES = ROOT / "examples"
sys.path[:0] = [str(PAGES), str(ROOT / "bench")]
import enlarge
import inpaint
import vary

QUICK = ["--steps=2", "--device=cpu", f"--out_dir={ROOT / 'assets' / 'cfm'}"]
KEEP = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
KEEP[..., :2] = True  # the left half is known
MEANS = torch.tensor([-0.6, 0.6])  # of both classes, in each pixel
SHARED, OWN = 0.3, 0.1  # deviations of what all pixels of a picture share, and of each pixel's own


def gaussian():
    """
    A VelocityField with an exact model: data of class k are N(MEANS[k], SHARED^2 11' + OWN^2 I), so
    one half of a picture tells much about the other. No label: half of each class.
    """
    D = KEEP.numel()
    covariance = SHARED**2 * torch.ones(D, D) + OWN**2 * torch.eye(D)

    def of_class(t, z, mean):
        a = t**2 * covariance + (1 - t) ** 2 * torch.eye(D)
        solved = torch.linalg.solve(a, (z - t * mean).T).T
        logs = -(((z - t * mean) * solved).sum(1)) / 2
        return mean + t * solved @ covariance - (1 - t) * solved, logs

    def v_model(t, x, y=None):
        tau, z = t[0].item(), x.flatten(1)
        values, logs = zip(*(of_class(tau, z, mean) for mean in MEANS.tolist()))
        weights = torch.stack(logs).softmax(0)
        if y is not None:
            weights = F.one_hot(y, 2).T.float()
        return (weights[:, :, None] * torch.stack(values)).sum(0).reshape(x.shape)

    return VelocityField(v_model, ConditionalFlowMatcher())


def filling(known):
    return lambda x: torch.where(KEEP, known, x)


@pytest.mark.parametrize("label, mean", [(0, -0.6), (1, 0.6)])
def test_a_fill_is_what_the_known_half_implies(label, mean):
    """E[hidden | known], in closed form. The mean of the class itself would be 0.19 away."""
    torch.manual_seed(0)
    known = torch.where(KEEP, mean + 0.2, torch.zeros(500, 1, 2, 4))
    y = torch.full((500,), label)
    x = inpaint.restore(gaussian(), filling(known), known, y, steps=50)
    n = int(KEEP.sum())
    expected = mean + 0.2 * n * SHARED**2 / (n * SHARED**2 + OWN**2)
    assert torch.equal(x[..., :2], known[..., :2])
    assert x[..., 2:].mean().item() == pytest.approx(expected, abs=0.03)
    assert 0.01 < x[..., 2:].std().item() < 0.2  # the fills differ, but not as classes do


def test_classes_are_weighed_by_what_is_known_of_each_picture():
    torch.manual_seed(0)
    x = torch.tensor([-0.6, 0.6, 0.4])[:, None, None, None].expand(3, 1, 2, 4)
    weights = inpaint.weigh_classes(gaussian(), filling(x), torch.zeros(3, 1, 2, 4), 2)
    assert torch.allclose(weights.sum(1), torch.ones(3))
    assert weights.argmax(1).tolist() == [0, 1, 1] and weights.max(1).values.min() > 0.99


def test_the_weight_of_a_class_by_hand():
    """One trial, at tau = 0.5: its squared error over the known pixels, to the power -sharpness."""
    known = torch.where(KEEP, 0.5, torch.zeros(1, 1, 2, 4))
    noise = torch.full_like(known, 0.3)
    weights = inpaint.weigh_classes(gaussian(), filling(known), 0 * known, 2, trials=1,
                                    sharpness=1.5, randn=lambda x: noise)
    z, tau, errors = 0.5 * known + 0.5 * noise, torch.full((1,), 0.5), []
    for k in range(2):
        predicted = z + 0.5 * gaussian().velocity(tau, z, torch.tensor([k]))
        errors.append((predicted.clamp(-1, 1) - known)[..., :2].square().sum().item())
    expected = np.array(errors) ** -1.5
    assert weights[0].tolist() == pytest.approx(list(expected / expected.sum()), rel=1e-4)


def test_the_projection_onto_means_is_in_range_and_the_nearest():
    """In Kullback-Leibler divergence, as probabilities of white. Clipping alone breaks the means."""
    torch.manual_seed(0)
    small = torch.rand(3, 2, 2, 3) * 1.8 - 0.9
    small[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.999])
    x = (2 * torch.rand(3, 2, 8, 12) - 1) * 0.99
    nearest = enlarge.project_means(x, small, 4)
    assert nearest.abs().max() <= 1
    assert torch.allclose(F.avg_pool2d(nearest, 4), small, atol=1e-5)
    again = enlarge.project_means(nearest, small, 4)[1:]
    assert torch.allclose(again, nearest[1:], atol=3e-3)
    gap = F.avg_pool2d(x, 4) - small
    clipped = (x - F.interpolate(gap, scale_factor=4)).clamp(-1, 1)
    assert (F.avg_pool2d(clipped, 4) - small).abs().max() > 0.1

    def divergence(a):
        p, q = ((v.double() + 1) / 2 for v in (a, x))
        terms = torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
        return terms.sum()

    for seed in range(20):  # along the line to another picture of the kind it only grows
        torch.manual_seed(seed)
        other = enlarge.project_means(2 * torch.rand(x.shape) - 1, small, 4)
        assert divergence(0.99 * nearest + 0.01 * other) > divergence(nearest) - 1e-5


def test_the_projection_leaves_black_black():
    """A block with a white dot on black, too dark on the whole: the background moves far less."""
    x = torch.full((1, 1, 4, 4), -1.0)
    x[..., 1, 1], x[..., 2, 2] = 1.0, 0.0
    moved = enlarge.project_means(x, x.mean().reshape(1, 1, 1, 1) + 0.05, 4)
    assert moved[..., 2, 2] > 0.5 and moved[..., 0, 0] < -0.99


def test_variations_go_from_the_same_to_new():
    """At strength 1 they are draws of the class; in between, more of the noise means farther."""
    torch.manual_seed(0)
    x = 0.6 + 0.3 * torch.randn(2000, 1, 1, 1).expand(2000, 1, 2, 4)
    noise = torch.randn_like(x)
    y = torch.ones(2000, dtype=torch.long)
    assert torch.equal(vary.vary(gaussian(), x, noise, 0.0, y), x)
    strip = [vary.vary(gaussian(), x, noise, s, y, steps=40) for s in (0.2, 0.5, 0.8, 1.0)]
    kept = [torch.corrcoef(torch.stack([x, v]).mean((2, 3, 4)))[0, 1] for v in strip]
    assert kept[0] > 0.9 > kept[1] > kept[2] > 0.15 and abs(kept[3]) < 0.1
    means = strip[3].mean((1, 2, 3))
    assert means.mean().item() == pytest.approx(0.6, abs=0.05)
    assert means.std().item() == pytest.approx(SHARED, abs=0.05)


def test_the_pages_share_what_they_share_byte_for_byte():
    def method(name):
        text = (PAGES / f"{name}.py").read_text().split("def weigh_classes")[1]
        return text[:text.index("    return project(x)\n")]

    assert method("inpaint") == method("enlarge") and "def restore" in method("inpaint")


# ---- the commands ----


def digit(path, right=0):
    """A grey 28 x 28 picture: an upright bar on the left, and right in all pixels of the right."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[4:24, 8:12] = 251
    pixels[:, 14:] = right
    Image.fromarray(pixels).save(path)
    return pixels


def fills_in(folder):
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def test_inpaint_keeps_known_pixels_and_never_sees_the_others(tmp_path):
    known = digit(tmp_path / "a.png")
    digit(tmp_path / "b.png", right=200)
    for name in "ab":
        here("examples/inpaint", *QUICK, f"--picture={name}.png", "--fills=3", f"--save={name}",
             cwd=tmp_path)
    a, b = fills_in(tmp_path / "a"), fills_in(tmp_path / "b")
    assert all((x[:, :14] == known[:, :14]).all() for x in a)
    assert (a[0] != a[1]).any() and (a[1] != a[2]).any()
    assert np.array_equal(a, b)


def test_inpaint_writes_the_fills_and_their_classes_as_an_npz(tmp_path):
    """The same pictures as in a folder, for bench/faces.py."""
    digit(tmp_path / "a.png")
    for save in ("fills", "fills.npz"):
        here("examples/inpaint", *QUICK, "--picture=a.png", "--fills=3", "--labels=8",
             f"--save={save}", cwd=tmp_path)
    arrays = np.load(tmp_path / "fills.npz")
    assert arrays["arr_0"].shape == (3, 28, 28, 1) and arrays["arr_1"].tolist() == [8, 8, 8]
    assert np.array_equal(arrays["arr_0"][..., 0], fills_in(tmp_path / "fills"))


def test_inpaint_takes_a_mask_of_your_own(tmp_path):
    """White is hidden. With the label given, no class is tried."""
    known, mask = digit(tmp_path / "a.png"), np.zeros((28, 28), np.uint8)
    mask[20:, 3:9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    said = here("examples/inpaint", *QUICK, "--picture=a.png", "--mask=mask.png", "--labels=1",
                "--save=fills", cwd=tmp_path)
    assert "filled in as" not in said
    for x in fills_in(tmp_path / "fills"):
        assert (x[mask == 0] == known[mask == 0]).all()


def test_a_mask_of_the_pictures_size_hides_the_same_place(tmp_path):
    """Both are cropped to the middle. A pixel is hidden if any of what it shows is."""
    pixels, mask = np.zeros((2, 200, 300), np.uint8)
    pixels[100:120, 150:170] = mask[100:120, 150:170] = 255      # pixels 14 to 16.8 of 28
    for name, content in (("a", pixels), ("mask", mask)):
        Image.fromarray(content).save(tmp_path / f"{name}.png")
    keep = inpaint.read_mask(str(tmp_path / "mask.png"), 28, 28)
    expected = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    expected[..., 14:17, 14:17] = False
    assert torch.equal(keep, expected)
    x = load_picture(tmp_path / "a.png", (1, 28, 28), "black", False)
    assert x[expected].max() < 30 and x[..., 14:16, 14:16].min() > 200


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarged_pictures_averaged_are_the_input_within_one_grey_level(factor, tmp_path):
    size = 28 // factor
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)
    pixels[0, :3] = 0, 255, 254
    Image.fromarray(pixels).save(tmp_path / "small.png")
    here("examples/enlarge", *QUICK, "--picture=small.png", f"--factor={factor}", "--versions=2",
         "--save=large", cwd=tmp_path)
    large = fills_in(tmp_path / "large")
    for x in large:
        means = x.reshape(size, factor, size, factor).astype(float).mean((1, 3))
        assert np.abs(means - pixels).max() <= 1
    assert (large[0] != large[1]).any()


def test_the_pages_draw_grids_of_a_users_picture_whatever_its_kind(tmp_path):
    """In colour, transparent and of another size. The page says what it did."""
    colours = np.zeros((40, 60, 4), np.uint8)
    colours[..., 0], colours[10:30, 20:40, 3] = 200, 255
    Image.fromarray(colours).save(tmp_path / "mine.png")
    for page, width in (("inpaint", 6), ("enlarge", 6), ("vary", 11)):
        said = here(f"examples/{page}", *QUICK, "--picture=mine.png", cwd=tmp_path)
        assert "mine.png: from 60 x 40 pixels to" in said
        assert "cropped to its middle, and from colour to grey" in said
        assert Image.open(tmp_path / "out" / f"{page}.png").size == (30 * width + 2, 32)


def test_a_picture_of_sixteen_bits_is_read_as_one_of_eight(tmp_path):
    pixels = digit(tmp_path / "eight.png").astype(np.uint16)
    Image.fromarray(pixels * 257).save(tmp_path / "sixteen.png")
    read = [load_picture(tmp_path / f"{name}.png", (1, 28, 28), "black", False)
            for name in ("eight", "sixteen")]
    assert torch.equal(*read)


def test_of_an_animation_the_first_picture_is_taken_and_that_is_said(tmp_path, capsys):
    pixels = digit(tmp_path / "one.png")
    frames = [Image.fromarray(x) for x in (pixels, pixels.T)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    x = load_picture(tmp_path / "two.gif", (1, 28, 28))
    assert "to 28 x 28, of the first picture in it\n" in capsys.readouterr().out
    assert torch.equal(x, load_picture(tmp_path / "one.png", (1, 28, 28)))
    assert "first picture" not in capsys.readouterr().out
    content = (tmp_path / "two.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(content[:-len(content) // 4])     # in the second one
    assert torch.equal(x, load_picture(tmp_path / "cut.gif", (1, 28, 28)))


def test_a_slash_after_the_files_name_does_no_harm(tmp_path):
    digit(tmp_path / "a.png")
    for page, save in [("inpaint", "i.npz"), ("inpaint", "i.png"), ("enlarge", "e.png"), ("vary", "v.png")]:
        here(f"examples/{page}", *QUICK, "--picture=a.png", f"--save={save}/", cwd=tmp_path)
        assert (tmp_path / save).is_file()


def test_a_negative_is_noticed_and_nothing_else_is(tmp_path):
    """Dark ink on white paper for a run of white on black; a photograph is neither."""
    pixels = digit(tmp_path / "white.png")
    Image.fromarray(255 - pixels).save(tmp_path / "dark.png")
    Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)).save(tmp_path / "photo.png")
    for options, hint in [
        (["--picture=white.png"], ""),
        (["--picture=photo.png"], ""),
        (["--picture=dark.png"], "try it with --invert"),
        (["--picture=dark.png", "--invert"], ""),
        (["--picture=white.png", "--invert"], "try it without --invert"),
    ]:
        for page in ("inpaint", "enlarge", "vary"):
            said = here(f"examples/{page}", *QUICK, "--labels=1", *options, cwd=tmp_path)
            assert hint in said and ("try it" in said) == bool(hint)
    pixels[:], pixels[9, 9] = 0, 255                         # for a run of bright colours
    Image.fromarray(pixels).save(tmp_path / "dot.png")
    faces = f"--out_dir={ROOT / 'assets' / 'faces'}"
    assert load_run(ROOT / "assets" / "faces")[0].means.mean() > -0.2
    assert "try it" not in here("examples/vary", *QUICK, faces, "--picture=dot.png", cwd=tmp_path)


def test_misuse_ends_in_one_line(tmp_path):
    for name, value in (("black", 0), ("white", 255)):
        Image.fromarray(np.full((28, 28), value, np.uint8)).save(tmp_path / f"{name}.png")
    digit(tmp_path / "a.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    ink = np.zeros((28, 28, 4), np.uint8)
    ink[4:24, 8:12, 3] = 255
    Image.fromarray(ink).save(tmp_path / "ink.png")
    given = [*QUICK, "--picture=a.png"]
    for page, options, message in [
        ("inpaint", [*QUICK, "--picture=none.png"], "--picture=none.png: [Errno 2] No such file"),
        ("inpaint", [*QUICK, "--picture=."], "--picture=.: [Errno 21] Is a directory"),
        ("vary", [*QUICK, "--picture=text.png"], "--picture=text.png: cannot identify image file"),
        ("vary", [*QUICK, "--picture=ink.png"], "all of its pixels are alike"),
        ("inpaint", [*given, "--mask=none.png"], "No such file"),
        ("inpaint", [*given, "--mask=small.png"], "at least 28 x 28 pixels, not 9 x 9"),
        ("inpaint", [*given, "--mask=black.png"], "must hide some pixels"),
        ("inpaint", [*given, "--mask=white.png"], "and not all"),
        ("inpaint", [*given, "--labels=cat"], "there is no class cat"),
        ("inpaint", [*given, "--save=x.gif"], "--save=x.gif: must end in .png or .npz, or"),
        ("enlarge", [*given, "--save=."], "--save=.: must end in .png, or else be a new or empty"),
        ("vary", [*given, "--save=x"], "--save=x: must end in .png, and not be a folder\n"),
        ("inpaint", [*given, "--labels=3,8"], "--labels=3,8: more classes, 2, than pictures, 1"),
        ("enlarge", [*given, "--labels=3,8"], "--labels=3,8: more classes, 2, than pictures, 1"),
        ("vary", [*given, "--labels=3,8"], "--labels=3,8: more classes, 2, than pictures, 1"),
        ("vary", ["a.png"], "a.png is not a config file: line 1 must be `key = literal` (on the "
                            "command line, options are written --key=value)"),
        ("enlarge", [*given, "--factor=3"], "does not divide"),
        ("vary", [*given, "--strengths=2"], "not between 0 and 1"),
        ("vary", ["--out_dir=nowhere"], "there is no valid checkpoint"),
    ]:
        refused(f"examples/{page}", *options, cwd=tmp_path, message=message)


def test_runs_that_cannot_edit_are_refused(tmp_path):
    """On a curved path, of another noise, and of one step."""
    file = torch.load(ROOT / "assets" / "cfm" / "ckpt.pt", weights_only=True)
    changes = {"vp": {"config": file["config"] | {"path": "vp"}},
               "wide": {"config": file["config"] | {"sigma": 0.1}},
               "one": {"limits": {"steps": (1, 1)}}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        torch.save(file | change, tmp_path / name / "ckpt.pt")
        for page in ("inpaint", "enlarge", "vary"):
            refused(f"examples/{page}", f"--out_dir={name}", cwd=tmp_path, message="cannot edit")
        refused("examples/sde", f"--out_dir={name}", cwd=tmp_path, message="has no score")
