"""
The peers as oracles, where they are installed:

    pip install --no-deps torchcfm pot scipy labml-nn labml labml-helpers
"""

import pytest
import torch

from cfm import ConditionalFlowMatcher
from ddpm import DenoiseDiffusion


@pytest.mark.parametrize("sigma", [0, 0.0, 5e-4, 0.5, 1, 1.5])
@pytest.mark.parametrize("shape", [(6, 2), (6, 3, 4), (6, 1, 5, 4)])
def test_torchcfm_to_equality(sigma, shape):
    peer = pytest.importorskip("torchcfm.conditional_flow_matching").ConditionalFlowMatcher(sigma)
    ours, x0, x1 = ConditionalFlowMatcher(sigma), torch.randn(shape), torch.randn(shape)
    results = []
    for matcher in (peer, ours):
        torch.manual_seed(3)
        results.append(matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    t, epsilon = torch.rand(6), torch.randn(shape)
    for name, args in (
        ("compute_mu_t", (x0, x1, t)),
        ("sample_xt", (x0, x1, t, epsilon)),
        ("compute_conditional_flow", (x0, x1, t, x0)),
    ):
        assert torch.equal(getattr(peer, name)(*args), getattr(ours, name)(*args))
    assert peer.compute_sigma_t(t) == ours.compute_sigma_t(t)


@pytest.fixture
def labml():
    """labml's DenoiseDiffusion and ours around the same fixed network, which labml calls as eps_model(xt, t)."""
    peer = pytest.importorskip("labml_nn.diffusion.ddpm").DenoiseDiffusion
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)

    def eps_model(x, t, y=None):
        return network(x) * (1 + t.reshape(-1, 1, 1, 1) / 1000)

    return peer(eps_model, 1000, "cpu"), DenoiseDiffusion(eps_model, 1000, "cpu")


def test_labml(labml):
    peer, ours = labml
    x0, eps, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor([1, 20, 500, 999])
    for name in ("beta", "alpha", "alpha_bar", "sigma2"):
        assert torch.allclose(getattr(peer, name), getattr(ours, name), rtol=2e-4, atol=1e-8), name
    for a, b in zip(peer.q_xt_x0(x0, t), ours.q_xt_x0(x0, t)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert torch.allclose(peer.q_sample(x0, t, eps), ours.q_sample(x0, t, eps), atol=1e-5)
    draws, losses = [], []
    for method in (peer, ours):
        torch.manual_seed(1)
        draws.append(method.p_sample(x0, t))
        torch.manual_seed(2)
        losses.append(method.loss(x0, eps))
    assert torch.allclose(*draws, atol=1e-4)
    assert torch.allclose(*losses, rtol=1e-4)
