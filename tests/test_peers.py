"""
The peers as oracles, if they are installed:

    pip install -r bench/requirements.txt
    pip install --no-deps torchcfm labml-nn labml labml-helpers denoising-diffusion-pytorch
"""

import math

import pytest
import torch
from exact import count_calls

from cfm import PATHS, ConditionalFlowMatcher, VelocityField, sinkhorn
from ddpm import DenoiseDiffusion
from sample import LOOK_AHEAD, ddim, dpm_solver, draw, flow
from unet import UNet

SIGMAS = [0, 0.0, 5e-4, 0.5, 1, 1.5]
SHAPES = [(6, 2), (6, 3, 4), (6, 1, 5, 4)]
TORCHCFMS_SHAPES = [(128, 1), (128, 2), (128, 1, 2), (128, 3, 4, 5)]  # from its own tests


@pytest.fixture
def torchcfm():
    name = "torchcfm.conditional_flow_matching"
    return pytest.importorskip(name, reason="torchcfm is not installed")


def same(peer, ours, x0, x1):
    """Both give the same, bit for bit, with the same seed."""
    results = []
    for matcher in (peer, ours):
        torch.manual_seed(3)
        results.append(matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True))
    for a, b in zip(*results):
        assert torch.equal(a, b) or (a.isnan() & b.isnan() | (a == b)).all()
    t, epsilon = torch.rand(len(x0)), torch.randn(x0.shape)
    for name, args in (
        ("compute_mu_t", (x0, x1, t)),
        ("sample_xt", (x0, x1, t, epsilon)),
        ("compute_conditional_flow", (x0, x1, t, epsilon)),
        ("compute_sigma_t", (t,)),
        ("compute_lambda", (t,)),
    ):
        assert torch.equal(*(torch.as_tensor(getattr(m, name)(*args)) for m in (peer, ours))), name


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("shape", SHAPES + TORCHCFMS_SHAPES)
@pytest.mark.parametrize("path", ["icfm", "target", "vp"])
def test_torchcfm_to_equality(torchcfm, path, sigma, shape):
    ours, x0, x1 = PATHS[path](sigma), torch.randn(shape), torch.randn(shape)
    same(getattr(torchcfm, type(ours).__name__)(sigma), ours, x0, x1)


@pytest.mark.filterwarnings("ignore:Small sigma")
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("shape", SHAPES + TORCHCFMS_SHAPES)
@pytest.mark.parametrize("path", ["ot", "sb_exact", "sb"])
def test_torchcfm_to_equality_after_pairing(torchcfm, path, sigma, shape, monkeypatch):
    """
    Given the noise that ours paired, everything is equal.

    By design, ours keeps each picture once, while torchcfm draws pairs with replacement, and takes
    labels as y=, not through guided_sample_location_and_conditional_flow().
    """
    name = type(PATHS[path](0.5)).__name__
    options = {"ot_method": "sinkhorn"} if path == "sb" else {}
    if path != "ot" and sigma == 0:
        for matcher in (getattr(torchcfm, name), PATHS[path]):
            with pytest.raises(ValueError):
                matcher(sigma)
        return
    ours, x0, x1 = PATHS[path](sigma), torch.randn(shape), torch.randn(shape)
    peer = getattr(torchcfm, name)(sigma, **options)
    paired = ours.pair(x0, x1)
    if path != "sb":  # the plan costs the same; in one dimension, rounding breaks the ties
        plan = torch.as_tensor(peer.ot_sampler.get_map(x0, x1))
        cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()) ** 2
        own = (paired - x1).double().square().flatten(1).sum(1).mean()
        assert torch.allclose((plan * cost).sum(), own, rtol=1e-5)
    monkeypatch.setattr(peer.ot_sampler, "sample_plan", lambda x0, x1, replace=True: (x0, x1))
    monkeypatch.setattr(ours, "pair", lambda x0, x1, y=None: x0)
    same(peer, ours, paired, x1)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1, 2])
def test_sinkhorn_is_the_plan_of_pot(torchcfm, sigma):
    """As torchcfm calls it, at a scale where POT, which is not in log space, does not underflow."""
    x0, x1 = torch.randn(20, 2), torch.randn(20, 2)
    peer = torchcfm.SchrodingerBridgeConditionalFlowMatcher(sigma, ot_method="sinkhorn")
    plan = torch.as_tensor(peer.ot_sampler.get_map(x0, x1))
    cost = torch.cdist(x0, x1) ** 2
    assert torch.allclose(sinkhorn(cost, 2 * sigma**2, 1e-9, 100_000), plan.double(), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_given_times_are_those_that_would_be_drawn(path):
    if path in ("ot", "sb_exact"):
        pytest.importorskip("scipy")
    matcher, x0, x1 = PATHS[path](0.1), torch.randn(128, 2), torch.randn(128, 2)
    torch.manual_seed(4)
    given = torch.rand(128)
    torch.manual_seed(4)
    drawn, _, _ = matcher.sample_location_and_conditional_flow(x0, x1)
    assert torch.equal(given, drawn)


def test_a_class_is_exactly_torchcfms_by_name(torchcfm):
    assert {type(p(0.5)).__name__ for p in PATHS.values()} <= set(dir(torchcfm))
    public = {n for n in dir(torchcfm.ConditionalFlowMatcher) if n[0] != "_"}
    assert public <= set(dir(ConditionalFlowMatcher))


def network(x, t, y=None):
    """A fixed function of x and t, to be called as (x, t) or by name."""
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 6
    of_x = torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1))
    return of_x * (1 + t.reshape(-1, 1, 1, 1) / 1000)


@pytest.fixture
def labml():
    peer = pytest.importorskip("labml_nn.diffusion.ddpm", reason="labml-nn is not installed")
    return peer.DenoiseDiffusion(network, 1000, "cpu"), DenoiseDiffusion(network, 1000, "cpu")


def test_labml(labml):
    peer, ours = labml
    x0, eps = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    t = torch.tensor([1, 20, 500, 999])
    for name in ("beta", "alpha", "alpha_bar", "sigma2"):
        assert torch.allclose(getattr(peer, name), getattr(ours, name), rtol=2e-4, atol=1e-8), name
    for a, b in zip(peer.q_xt_x0(x0, t), ours.q_xt_x0(x0, t)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert torch.allclose(peer.q_sample(x0, t, eps), ours.q_sample(x0, t, eps), atol=1e-5)
    times = []

    def recording_network(x, t):
        times.append(t)
        return network(x, t)

    peer.eps_model = recording_network  # labml draws times of its own: ours gets the same
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = peer.loss(x0, eps)
        assert torch.allclose(
            theirs, ours.loss(x0, noise=eps, u=(times[-1] + 0.5) / 1000), rtol=1e-4
        )
    assert len(torch.cat(times).unique()) > 60


def test_labml_p_sample_at_all_t_but_the_last_step(labml):
    """There labml adds noise; Algorithm 2, line 3, does not."""
    for t in range(1, 1000):
        draws, xt = [], torch.randn(1, 3, 4, 4)
        for method in labml:
            torch.manual_seed(t)
            draws.append(method.p_sample(xt, torch.tensor([t])))
        assert torch.allclose(*draws, atol=1e-4), t


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


OPTIONS = {"linear": {}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
KINDS = [(s, p) for s in OPTIONS for p in PREDICTIONS]


def pair_of(scheduler, schedule, prediction, **options):
    """A scheduler and a DenoiseDiffusion around the same network, and a starting x."""
    variance = options.pop("variance", "fixedlarge")
    ours = DenoiseDiffusion(network, schedule=schedule, prediction=prediction, variance=variance)
    peer = scheduler(prediction_type=PREDICTIONS[prediction], **OPTIONS[schedule], **options)
    return peer, ours, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", OPTIONS)
def test_diffusers_tables(diffusers, schedule):
    peer, ours, x0 = pair_of(diffusers.DDPMScheduler, schedule, "eps")
    assert torch.allclose(peer.betas, ours.beta, rtol=2e-3, atol=1e-7)
    assert torch.allclose(peer.alphas_cumprod, ours.alpha_bar, rtol=2e-3, atol=1e-7)
    eps, t = torch.randn(x0.shape), torch.tensor([3, 700])
    assert torch.allclose(peer.add_noise(x0, eps, t), ours.q_sample(x0, t, eps), atol=1e-4)
    alpha, sigma = ours.scales(t, x0)
    assert torch.allclose(peer.get_velocity(x0, eps, t), alpha * eps - sigma * x0, atol=1e-4)


@pytest.mark.parametrize("schedule, prediction", KINDS)
@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_diffusers_ancestral(diffusers, schedule, prediction, variance):
    name = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}[variance]
    peer, ours, x = pair_of(
        diffusers.DDPMScheduler, schedule, prediction, variance=variance, variance_type=name
    )
    peer.set_timesteps(1000)
    sources, theirs = [torch.Generator().manual_seed(5) for _ in range(2)], x
    for t in peer.timesteps:
        theirs = peer.step(
            network(theirs, t.repeat(2)), t, theirs, generator=sources[0]
        ).prev_sample
    noises = (torch.randn(x.shape, generator=sources[1]) for _ in range(1000))
    calls = count_calls(ours)
    found = draw(ours, x, sampler="ancestral", randn=lambda _: next(noises))
    assert len(calls) == 1000 and torch.allclose(theirs, found, atol=2e-3)


@pytest.mark.parametrize("schedule, prediction", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_diffusers_ddim(diffusers, schedule, prediction, eta):
    peer, ours, x = pair_of(
        diffusers.DDIMScheduler, schedule, prediction, timestep_spacing="trailing"
    )
    peer.set_timesteps(50)
    noises, theirs = [torch.randn(x.shape) for _ in range(50)], x
    for t, noise in zip(peer.timesteps, noises):
        step = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise}
        theirs = peer.step(network(theirs, t.repeat(2)), t, theirs, **step).prev_sample
    taus, steps = [*ours.tau[peer.timesteps].tolist(), 1.0], iter(range(1, 51))

    def randn(z):  # theirs is in x, ours in z = x / (alpha + sigma): the step scales it
        return noises[next(steps) - 1]

    start = x * math.hypot(taus[0], 1 - taus[0])
    found = ddim(flow(ours), start, taus, clip=True, eta=eta, randn=randn)
    assert torch.allclose(theirs, found, atol=2e-3)


@pytest.mark.parametrize("schedule, prediction", KINDS)
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_diffusers_dpm_solver(diffusers, schedule, prediction, steps):
    peer, ours, x = pair_of(
        diffusers.DPMSolverMultistepScheduler,
        schedule,
        prediction,
        timestep_spacing="trailing",
        beta_start=1e-4,
        beta_end=0.02,
        thresholding=False,
    )
    peer.set_timesteps(steps)
    taus = [*ours.tau[peer.timesteps].tolist(), 1.0]
    theirs = x
    for t in peer.timesteps:
        theirs = peer.step(network(theirs, t.repeat(2)), t, theirs).prev_sample
    start = x * math.hypot(taus[0], 1 - taus[0])
    assert torch.allclose(theirs, dpm_solver(flow(ours), start, taus, clip=False), atol=2e-3)
    taus = ours.times(steps, even="dpm++" in LOOK_AHEAD)
    start = x * math.hypot(taus[0], 1 - taus[0])
    found = draw(ours, x, sampler="dpm++", steps=steps, clip=False)
    assert torch.equal(found, dpm_solver(flow(ours), start, taus, clip=False))


def test_the_steps_of_a_flow_are_those_of_diffusers_with_a_shift_of_2():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    peer.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])  # sigma = 1 - tau
    taus = VelocityField(None, ConditionalFlowMatcher()).times(6, even="euler" in LOOK_AHEAD)
    assert taus == pytest.approx((1 - peer.sigmas).tolist(), abs=1e-6)


def test_the_unet_of_cifar10_has_as_many_parameters_as_diffusers():
    """Theirs is google/ddpm-cifar10-32, converted from the model of Ho et al."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import UNet2DModel

    with torch.device("meta"):
        peer = UNet2DModel(
            sample_size=32,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        ours = UNet(3, 128, (1, 2, 2, 2), n_res_blocks=2, attention_levels=(1, 4), patch=1)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
