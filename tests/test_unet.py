"""The UNet: any size and channels, times and labels matter, it predicts 0 at first; and Muon."""

import copy
import math

import pytest
import torch

import cfm
import ddpm
import sample

from core.muon import Muon, newton_schulz
from unet import Norm, UNet, time_embedding


def small(**options):
    torch.manual_seed(0)
    model = UNet(channels=8, **options)
    torch.nn.init.normal_(model.conv_out.weight)  # else it predicts zero
    for m in model.modules():
        if hasattr(m, "conv2"):
            torch.nn.init.normal_(m.conv2.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (1, 1), (17, 31), (5, 64), (125, 126)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch": 1, "channel_mults": (1, 2, 2, 2), "n_res_blocks": 2},
        {"patch": 4, "channel_mults": (3,), "attention_levels": (0, 1)},
    ],
)
def test_any_size(size, options):
    x = torch.randn(2, 1, *size)
    assert small(**options)(t=torch.rand(2), x=x).shape == x.shape


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels(channels):
    x = torch.randn(2, channels, 8, 8)
    assert small(in_channels=channels)(t=torch.rand(2), x=x).shape == x.shape


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side, options", [(1, {"channel_mults": (2, 1, 3)}), (4, {"patch": 16})])
def test_a_picture_of_one_position_can_be_trained_on(channels, side, options):
    """Some groups of the norms then hold a single value, which F.group_norm() would refuse."""
    model = small(in_channels=channels, **options).train()
    x = torch.randn(1, channels, side, side, requires_grad=True)
    out = model(t=torch.rand(1), x=x)
    assert out.shape == x.shape and torch.isfinite(out).all() and out.abs().max() > 0
    out.square().sum().backward()
    for p in (x, *model.parameters()):
        assert torch.isfinite(p.grad).all()
    assert model.conv_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("channels", [8, 12, 24, 7])
def test_norm_is_group_norm_but_for_single_values(channels):
    norm, groups = Norm(channels), {8: 8, 12: 4, 24: 8, 7: 1}[channels]
    peer = torch.nn.GroupNorm(groups, channels)
    for n, p in ((norm.weight, peer.weight), (norm.bias, peer.bias)):
        torch.nn.init.normal_(p)
        n.data.copy_(p)
    x = torch.randn(3, channels, 5, 4)
    assert torch.equal(norm(x), peer(x))
    if channels == groups:  # each value is its group's mean, so only the bias is left
        assert torch.allclose(norm(x[:1, :, :1, :1]).flatten(), norm.bias, atol=1e-3)
        with pytest.raises(ValueError):
            peer(x[:1, :, :1, :1])


def test_it_starts_by_predicting_zero():
    assert UNet()(t=torch.rand(2), x=torch.randn(2, 1, 28, 28)).abs().max() == 0


def test_times_are_told_apart():
    """Unscaled, the embeddings of t = 0 and t = 1 would have a cosine of 0.97."""
    emb = time_embedding(torch.tensor([0, 0.001, 0.5, 1]), 32)
    cosine = torch.nn.functional.cosine_similarity(emb[:, None], emb[None], dim=2)
    assert (
        emb.shape == (4, 32) and cosine[0, 3] < 0.6 and cosine[0, 2] < 0.6 and cosine[0, 1] < 0.99
    )
    x, model = torch.randn(1, 1, 8, 8), small()
    assert not torch.allclose(model(t=torch.zeros(1), x=x), model(t=torch.ones(1), x=x), atol=1e-3)


def test_labels_matter_and_minus_one_is_no_label():
    model, t, x = small(num_classes=3), torch.rand(2), torch.randn(2, 1, 8, 8)
    none, zero, two = (model(t=t, x=x, y=torch.full((2,), y)) for y in (-1, 0, 2))
    assert (
        torch.equal(none, model(t=t, x=x))
        and not torch.equal(none, zero)
        and not torch.equal(zero, two)
    )


def test_each_picture_has_its_own_time_and_label():
    model, t, x, y = (
        small(num_classes=3),
        torch.rand(4),
        torch.randn(4, 1, 8, 8),
        torch.tensor([0, 1, 2, -1]),
    )
    together = model(t=t, x=x, y=y)
    alone = torch.cat([model(t=t[i : i + 1], x=x[i : i + 1], y=y[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_gradients_reach_every_parameter():
    model = small(num_classes=3, attention_levels=(0, 1, 2), n_res_blocks=2)
    for m in model.modules():
        if hasattr(m, "qkv"):
            torch.nn.init.normal_(m.out.weight)
    model(
        t=torch.rand(2), x=torch.randn(2, 1, 8, 8), y=torch.tensor([0, -1])
    ).square().mean().backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ] == []


def test_dropout_acts_in_training_only():
    model, t, x = small(dropout=0.5), torch.rand(1), torch.randn(1, 1, 8, 8)
    assert torch.equal(model(t=t, x=x), model(t=t, x=x))
    model.train()
    assert not torch.equal(model(t=t, x=x), model(t=t, x=x))


def test_attention_mixes_positions_of_any_level():
    for level in range(3):
        assert sum("qkv" in n for n, _ in UNet(attention_levels=(level,)).named_parameters()) > 0
    assert not any("qkv" in n for n, _ in UNet(attention_levels=()).named_parameters())
    with pytest.raises(ValueError, match="levels go from 0 to 2"):
        UNet(attention_levels=(3,))
    with pytest.raises(ValueError, match="even"):
        UNet(channels=7)


def test_at_the_size_of_ho_et_al_it_has_their_number_of_parameters():
    """35,746,307, like diffusers' UNet in google/ddpm-cifar10-32; see also test_peers.py."""
    with torch.device("meta"):
        model = UNet(3, 128, (1, 2, 2, 2), n_res_blocks=2, attention_levels=(1, 4), patch=1)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


@pytest.mark.parametrize("shape", [(3, 8, 72), (2, 64, 16), (1, 24, 24), (2, 1, 9)])
def test_newton_schulz_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    g = torch.randn(*shape)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ newton_schulz(g) @ vt.mT
    level = inner.diagonal(dim1=1, dim2=2)
    assert 0.6 < level.min() and level.max() < 1.25
    assert (inner - torch.diag_embed(level)).abs().max() < 1e-4


def two_models():
    """A model, its copy, and set_gradients(), which gives both the same gradients."""
    a = small(num_classes=3)
    b = copy.deepcopy(a)

    def set_gradients(seed):
        torch.manual_seed(seed)
        for p, q in zip(a.parameters(), b.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()

    return a, b, set_gradients


def test_muon_does_to_kernels_what_torchs_muon_does_and_to_the_rest_what_adamw_does():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    a, b, set_gradients = two_models()
    ours = Muon(a.parameters(), lr=0.01, weight_decay=0.1)
    flat = [torch.nn.Parameter(p.detach().flatten(1)) for p in b.parameters() if p.dim() == 4]
    muon = torch.optim.Muon(flat, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in b.parameters() if p.dim() != 4]
    adamw = torch.optim.AdamW(rest, 0.01, betas=(0.9, 0.99), weight_decay=0.1)
    before = copy.deepcopy(a)
    for i in range(5):
        set_gradients(i)
        for p, q in zip(flat, [p for p in b.parameters() if p.dim() == 4]):
            p.grad = q.grad.flatten(1)
        ours.step(), muon.step(), adamw.step()
    flat = iter(flat)
    for p, q, start in zip(a.parameters(), b.parameters(), before.parameters()):
        if p.dim() == 4:  # torch's works in bfloat16
            theirs = next(flat).view_as(p)
            assert (p - theirs).norm() < 0.02 * (theirs - start).norm()
        else:
            assert torch.allclose(p, q, atol=1e-6)


def test_the_state_of_muon_goes_where_the_parameters_are():
    """A checkpoint is loaded on the CPU; the meta device stands in for a GPU."""
    a, _, set_gradients = two_models()
    one = Muon(a.parameters())
    set_gradients(0)
    one.step()
    other = Muon(copy.deepcopy(a).to("meta").parameters())
    other.load_state_dict(one.state_dict())
    assert {v.device.type for state in other.state.values() for v in state.values()} == {"meta"}
    assert {len(state) for state in other.state.values()} == {1, 3}


def test_muon_goes_on_from_its_state_and_leaves_alone_what_has_no_gradient():
    a, b, set_gradients = two_models()
    one, other = Muon(a.parameters()), Muon(b.parameters())
    for i in range(4):
        if i == 2:
            state = one.state_dict()
            other = Muon(b.parameters())
            other.load_state_dict(copy.deepcopy(state))
        set_gradients(i)
        b.label.weight.grad = a.label.weight.grad = None
        one.step(), other.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(a.label.weight, small(num_classes=3).label.weight)


def test_muon_takes_named_parameters_and_groups_in_any_order():
    """Kernels are orthogonalised, everything else uses AdamW, however they are passed."""
    models = [small(num_classes=3) for _ in range(4)]
    one = Muon(models[0].parameters())
    named = Muon(models[1].named_parameters())
    added = Muon([models[2].conv_in.bias])
    rest = [p for p in models[2].parameters() if p is not models[2].conv_in.bias]
    added.add_param_group({"params": rest[::-1]})
    grouped = Muon([{"params": list(models[3].parameters()), "lr": 4e-3}])
    for optimizer, model in zip((one, named, added, grouped), models):
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(("square" in optimizer.state[p]) == (p.dim() != 4) for p in model.parameters())
    for model in models[1:]:
        for p, q in zip(model.parameters(), models[0].parameters()):
            assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("script", [cfm, ddpm])
def test_a_model_of_another_precision_trains_and_samples(script, dtype):
    """The arithmetic around it is in at least single precision."""
    model = small(num_classes=3).to(dtype)
    method = script.build(model, vars(script) | {"n_steps": 5, "path": "icfm", "sigma": 0.0})
    x, y = torch.rand(4, 1, 8, 8, dtype=dtype), torch.arange(4) % 3
    method.loss(x, y).backward()
    assert model.conv_in.weight.grad.dtype == dtype
    for sampler in ("euler", "dpm++"):
        for guidance in (1, 2):
            drawn = sample.draw(method, torch.randn_like(x), y, sampler, 2, guidance)
            assert drawn.shape == x.shape and drawn.isfinite().all()
            assert drawn.dtype == torch.promote_types(dtype, torch.float32)


def test_samplers_keep_double_precision():
    """dx/dt = -x from 1 leads to exp(-1)."""
    field = cfm.VelocityField(lambda t, x, y: -x, cfm.ConditionalFlowMatcher())
    x = sample.draw(field, torch.ones(1, 1, dtype=torch.float64), sampler="rk4", steps=200)
    assert abs(x.item() - math.exp(-1)) < 1e-11


def test_norm_groups_are_at_most_as_many_as_asked_for():
    def groups(**options):
        norms = [m for m in UNet(channels=12, **options).modules() if hasattr(m, "num_groups")]
        return {(m.num_channels, m.num_groups) for m in norms}

    assert groups(norm_groups=8) == {(12, 4), (24, 8), (36, 4), (48, 8)}
    assert {n for _, n in groups(norm_groups=1)} == {1}


def test_one_group_of_channels_tells_colours_apart_that_eight_groups_do_not():
    """Flat pictures: each group of one channel becomes 0, but the whole keeps their proportions."""
    flat = torch.tensor([[1.0, 0.2, -0.5, 0.3], [0.1, 0.9, 0.4, -0.8]])
    x = flat[:, :, None, None].expand(2, 4, 3, 3)
    separate, together = Norm(4), Norm(4)
    together.num_groups = 1
    assert separate(x).abs().max() < 1e-3
    assert (together(x)[0] - together(x)[1]).abs().max() > 1
