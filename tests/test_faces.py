"""The drawn faces, and the program in bench/ that reads them back."""

import functools
import importlib.util
from math import prod

import numpy as np
import pytest
import torch

from core.data import load_data
from core.faces import (
    CLASSES,
    COLOURS,
    COLUMNS,
    LETTERS,
    PAINTS,
    PARTS,
    designs_of,
    draw,
    draw_faces,
)
from helpers import ROOT, here, refused

# by its path: core/faces.py has the same name
spec = importlib.util.spec_from_file_location("bench_faces", ROOT / "bench" / "faces.py")
judge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(judge)


@functools.cache
def all_faces():
    """The pictures, classes and rows of numbers of the whole data set."""
    return draw_faces(50_000)


def number(part, design):
    return list(PARTS[part]).index(design)


def a_face(**designs):
    """A picture (1, 3, 16, 16) of a plain face but for these designs, in the first colours."""
    plain = {part: list(names)[0] for part, names in PARTS.items()} | designs
    face = [number(part, name) for part, name in plain.items()] + [0] * len(PAINTS)
    return draw(np.array([face]))


def legal(x):
    return judge.read(x)[2].tolist()


def test_the_same_seed_draws_the_same_faces_and_another_one_others():
    x, y, faces = draw_faces(300, seed=5)
    again, y_again, faces_again = draw_faces(300, seed=5)
    assert torch.equal(x, again) and torch.equal(y, y_again) and (faces == faces_again).all()
    assert not torch.equal(x, draw_faces(300, seed=6)[0])


def test_the_data_set_is_what_was_drawn_and_a_tenth_is_held_out():
    data = load_data("faces")
    x, y, _ = all_faces()
    assert torch.equal(data.held_out[0], x[:5000]) and torch.equal(data.held_out[1], y[:5000])
    assert torch.equal(data.train[0], x[5000:]) and torch.equal(data.train[1], y[5000:])
    assert x.shape[1:] == (3, 16, 16) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert data.classes == CLASSES and data.train[1].bincount().tolist() == [9000] * 5
    assert load_data("faces", image_size=8).train[0].shape == (45_000, 3, 8, 8)


def test_these_faces_never_change():
    """A model that was trained before draws what a model trained now would."""
    x, _, faces = draw_faces(1000)
    weights = np.arange(1, faces.shape[1] + 1)
    assert (faces @ weights).sum() == 137_583 and int(x.long().sum()) == 119_402_245


def test_no_part_claims_a_pixel_of_another_one():
    for kind in CLASSES:
        claims = np.zeros((16, 16), int)
        for part, designs in PARTS.items():
            own = np.stack([*designs.values()])[designs_of(kind, part)]
            claims += own.any(0)
        assert claims.max() == 1, kind


def test_designs_of_one_class_differ_and_every_letter_is_a_paint():
    for kind in CLASSES:
        for part, designs in PARTS.items():
            own = np.stack([*designs.values()])[designs_of(kind, part)]
            assert len(own) >= 3 and len(np.unique(own, axis=0)) == len(own)
    assert len(set(LETTERS)) == len(LETTERS)
    used = {LETTERS[i] for part in PARTS.values() for design in part.values() for i in np.unique(design)}
    assert used | {"s"} == set(LETTERS)
    named = " ".join(choices for _, choices in PAINTS.values()).replace(",", " ").split()
    assert set(named) == set(COLOURS)


def combinations(kind):
    """How many faces of a class there are, as pictures that differ."""
    designs = {part: [list(names.values())[i] for i in designs_of(kind, part)] for part, names in PARTS.items()}

    def colours(paint, *chosen):
        letters = [LETTERS.index(c) for c in PAINTS[paint][0]]
        return len(PAINTS[paint][1].split()) if np.isin(chosen, letters).any() else 1

    heads = sum(colours("extra", head, brow) for head in designs["head"] for brow in designs["brow"])
    eyes = sum(colours("iris", eyes) for eyes in designs["eyes"])
    everywhere = prod(len(PAINTS[paint][1].split()) for paint in ("background", "skin", "hair", "fabric"))
    others = prod(len(designs[part]) for part in ("cheeks", "mouth", "earrings", "clothes"))
    return heads * eyes * everywhere * others


def test_there_are_more_than_a_billion_faces():
    counts = {kind: combinations(kind) for kind in CLASSES}
    assert counts["plain"] == 353_894_400 and sum(counts.values()) == 1_509_580_800
    _, _, faces = all_faces()
    assert len(np.unique(faces, axis=0)) > 49_900


def test_within_a_class_parts_are_independent():
    """Each pair of columns: their joint frequencies are the products, up to chance."""
    _, y, faces = draw_faces(50_000, seed=3)
    plain = faces[y == 0]
    fabric, background = plain[:, COLUMNS.index("fabric")], plain[:, COLUMNS.index("background")]
    for a, b in [(plain[:, 0], fabric), (plain[:, 4], background), (fabric, background)]:
        joint = np.zeros((a.max() + 1, b.max() + 1))
        np.add.at(joint, (a, b), 1)
        joint = joint[joint.sum(1) > 0][:, joint.sum(0) > 0]
        expected = joint.sum(1, keepdims=True) * joint.sum(0) / joint.sum()
        chi2, freedom = ((joint - expected) ** 2 / expected).sum(), (len(joint) - 1) * (joint.shape[1] - 1)
        assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_every_face_reads_back_as_its_own_parts():
    """All of the data set, held-out faces too."""
    x, y, faces = all_faces()
    read, classes, legal = judge.read(x)
    assert legal.all() and (classes == y.numpy()).all() and (read == faces).all()


def test_colours_are_far_apart_and_the_tolerance_is_less_than_half_of_that():
    """The distance by brute force, from what is seen in the data set."""
    x = all_faces()[0].permute(0, 2, 3, 1).reshape(-1, 3).numpy().astype(int)
    seen = np.unique(x @ [1, 256, 65536])[:, None] // [1, 256, 65536] % 256
    apart = abs(seen[:, None] - seen).max(-1)
    assert len(seen) == len(COLOURS) and min(apart[apart > 0]) == judge.DISTANCE == 52
    assert judge.TOLERANCE == 25


def test_a_pixel_may_be_off_by_the_tolerance_and_no_more():
    x = a_face()
    for off, expected in [(judge.TOLERANCE, True), (judge.TOLERANCE + 1, False)]:
        changed = x.clone()
        changed[0, 1, 15, 4] += off if x[0, 1, 15, 4] < 128 else -off
        assert legal(changed) == [expected]


def test_two_half_hats_are_not_legal():
    names = {"brow": "soft", "cheeks": "plain"}
    cap, topper = a_face(head="hat:cap", **names), a_face(head="hat:topper", **names)
    assert legal(torch.cat([cap, topper])) == [True, True]
    halves = torch.cat([cap[..., :8], topper[..., 8:]], 3)
    faces, _, found = judge.read(halves)
    assert not found[0] and faces[0, 0] == -1
    assert faces[0, 1:7].tolist() == judge.read(cap)[0][0, 1:7].tolist()     # the rest is as it was


def test_a_hat_on_a_face_with_whiskers_is_not_legal():
    """Each part is a design, but no class has both."""
    assert legal(a_face(head="hat:cap", cheeks="cat:whiskers")) == [False]
    assert legal(a_face(head="cat:lynx", cheeks="cat:whiskers")) == [True]


def test_a_shifted_mouth_is_not_legal():
    x = a_face(mouth="smile")
    shifted = x.clone()
    shifted[..., 9:11, 6:11] = x[..., 9:11, 5:10]
    faces, _, found = judge.read(shifted)
    assert not found[0] and faces[0, COLUMNS.index("mouth")] == -1


@pytest.mark.parametrize("mixed", ["two colours", "in between", "another paint's", "two tones of two"])
def test_a_mixed_colour_is_not_legal(mixed):
    """In the hair, whose first colour is ink. The head is then not read, but the mouth is."""
    x = a_face(head="bob")
    hair = (x == torch.tensor(COLOURS["ink"])[:, None, None]).all(1)[0]
    hair[5:, 3:13] = False                          # eyes and mouth are of ink too
    light = (x == torch.tensor(COLOURS["dusk"])[:, None, None]).all(1)[0]
    where, colour = {
        "two colours": (hair & (torch.arange(16) < 8), COLOURS["fire"]),
        "in between": (hair, [(a + b) // 2 for a, b in zip(COLOURS["ink"], COLOURS["fire"])]),
        "another paint's": (hair, COLOURS["mint"]),
        "two tones of two": (light, COLOURS["sun"]),
    }[mixed]
    assert where.any()
    x[0, :, where] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    faces, _, found = judge.read(x)
    assert not found[0] and faces[0, 0] == -1
    assert faces[0, COLUMNS.index("mouth")] == 0


def test_a_beard_of_another_colour_than_the_hair_is_not_legal():
    """Every part is a design in one of its colours, but they disagree."""
    x, y = a_face(cheeks="beard:full"), a_face(cheeks="beard:full")
    hair = (x == torch.tensor(COLOURS["ink"])[:, None, None]).all(1)[0]
    hair[:11] = False                               # what is below the mouth
    x[0, :, hair] = torch.tensor(COLOURS["fire"], dtype=torch.uint8)[:, None]
    assert legal(y) == [True] and legal(x) == [False]


def test_noise_and_flat_pictures_are_not_legal():
    noise = torch.randint(256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    assert not any(legal(torch.cat([noise, torch.zeros(1, 3, 16, 16).byte()])))


def test_the_judge_by_value():
    """Half of the faces are known, a quarter is of another class than asked, one is broken."""
    x, y, faces = draw_faces(1000, seed=9)
    asked = y.clone()
    asked[:250] = (y[:250] + 1) % 5
    x[0, :, 0, 0] = 0
    found = judge.judge(x, asked, faces[500:])
    assert found["legal"] == 0.999 and found["asked"] == 0.75
    assert found["new"] == pytest.approx(499 / 999)
    assert found["read"]["mouth"] == 1 and 0.998 < found["read"]["head"] <= 1

    same = judge.judge(x[500:], y[500:], faces[500:])
    assert set(same["balance"].values()) == {0} and same["new"] == 0
    hats = judge.judge(x[y == 2], y[y == 2], faces[y == 0])
    assert hats["balance"]["head"] == pytest.approx(1)       # a hat for hair: no design in common
    assert hats["balance"]["mouth"] < 0.3


def save(file, x, y):
    np.savez(file, x.permute(0, 2, 3, 1).numpy(), y.numpy())


def test_the_program_judges_files_and_saves_a_small_training_set(tmp_path):
    x, y, _ = all_faces()
    save(tmp_path / "old.npz", x[5000:5200], y[5000:5200])
    save(tmp_path / "new.npz", x[5200:5300], y[5200:5300])
    args = "old.npz", "new.npz", "--train=200", "--save=few.npz"
    printed = here("bench/faces", *args, cwd=tmp_path)
    assert f"a pixel may be off by {judge.TOLERANCE}" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["old.npz"][1:5] == ["200", "100.00%", "100.00%", "0.00%"]
    assert rows["new.npz"][1:5] == ["100", "100.00%", "100.00%", "100.00%"]
    few = load_data(str(tmp_path / "few.npz"))
    assert len(few.train[0]) + len(few.held_out[0]) == 200 and few.classes == CLASSES
    assert {p.numpy().tobytes() for p in torch.cat([few.train[0], few.held_out[0]])} == {
        p.numpy().tobytes() for p in x[5000:5200]
    }


def test_bad_use_ends_in_one_line(tmp_path):
    x, y, _ = draw_faces(5)
    np.savez(tmp_path / "small.npz", np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, int))
    np.savez(tmp_path / "nolabels.npz", x.permute(0, 2, 3, 1).numpy())
    save(tmp_path / "labels.npz", x, y + 1)
    (tmp_path / "text.npz").write_text("no archive")
    for args, words in [
        (["small.npz"], "small.npz: arr_0 must be uint8 (N, 16, 16, 3), but is (3, 8, 8, 3)"),
        (["nolabels.npz"], "nolabels.npz: arr_1"),
        (["labels.npz"], "labels.npz: arr_1 must be a class for each picture, from 0 to 4"),
        (["text.npz"], "text.npz: "),
        (["nowhere.npz"], "nowhere.npz"),
        (["--train=50000"], "--train: 50000 is not between 1 and 45000"),
        (["--save=few.png"], "--save=few.png: must end in .npz"),
        (["--save=no/such/few.npz"], "--save=no/such/few.npz: "),
    ]:
        refused("bench/faces", *args, cwd=tmp_path, message=words)
