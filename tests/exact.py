"""
Models that need no training. If the data is a mixture of Gaussians, so is the data plus noise, and
whatever the two methods learn has a closed form. The flow is known too: with one component in
closed form; with several, in one dimension, because paths cannot cross there, so each point keeps
its quantile.
"""

import math

import torch

from cfm import ConditionalFlowMatcher, VelocityField
from ddpm import DenoiseDiffusion

ONE = ((1.0, 0.2, 0.5),)  # weight, mean, standard deviation of every pixel value
TWO = ((0.3, -0.6, 0.25), (0.7, 0.5, 0.4))


def components(mixture, alpha, sigma):
    """(weight, mean, variance) of each component of alpha data + sigma noise."""
    return [(w, alpha * m, alpha**2 * s**2 + sigma**2) for w, m, s in mixture]


def log_density(mixture, alpha, sigma, x):
    parts = [
        math.log(w) - ((x - m) ** 2 / v + torch.log(2 * math.pi * v)) / 2
        for w, m, v in components(mixture, alpha, sigma)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


def score(mixture, alpha, sigma, x):
    """d log density / dx."""
    parts = components(mixture, alpha, sigma)
    logs = torch.stack([math.log(w) - ((x - m) ** 2 / v + torch.log(v)) / 2 for w, m, v in parts])
    return (torch.softmax(logs, 0) * torch.stack([(m - x) / v for _, m, v in parts])).sum(0)


def predictions(mixture, alpha, sigma, x):
    """E[data | x], E[noise | x], by Tweedie's formula: the noise is -sigma times the score."""
    noise = -sigma * score(mixture, alpha, sigma, x)
    return (x - sigma * noise) / alpha, noise


def wide(t, x):
    return t.double().reshape(-1, *[1] * (x.dim() - 1))


def exact_cfm(mixture, matcher=None):
    """VelocityField whose model is E[data - noise | x] on the straight path."""

    def v_model(t, x, y=None):
        t, x = wide(t, x), x.double()
        noise = -(1 - t) * score(mixture, t, 1 - t, x)
        slope = score(mixture, t, 1 - t, x)
        # E[data | x] = (x + (1 - t)^2 score) / t, or the mean at t = 0
        data = torch.where(t > 1e-9, (x + (1 - t) ** 2 * slope) / t.clamp(min=1e-9), mean(mixture))
        return (data - noise).float()

    return VelocityField(v_model, matcher or ConditionalFlowMatcher())


def exact_ddpm(mixture, n_steps=1000, **options):
    """DenoiseDiffusion with an exact model, at any t, whole or fractional."""
    method = DenoiseDiffusion(None, n_steps, **options)
    taus = method.tau.double()

    def eps_model(t, x, y=None):
        low = t.double().floor().long().clamp(max=n_steps - 2)
        share = t.double() - low
        tau = wide((1 - share) * taus[low] + share * taus[low + 1], x)
        alpha, sigma = tau / torch.hypot(tau, 1 - tau), (1 - tau) / torch.hypot(tau, 1 - tau)
        x0, eps = predictions(mixture, alpha, sigma, x.double())
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[method.prediction].float()

    method.eps_model = eps_model
    return method


def count_calls(method):
    """A list that collects the batch size of every later call of the method's model."""
    name = "v_model" if isinstance(method, VelocityField) else "eps_model"
    model, batches = getattr(method, name), []

    def counting_model(t, x, y=None):
        batches.append(len(x))
        return model(t=t, x=x, y=y)

    setattr(method, name, counting_model)
    return batches


def mean(mixture):
    return sum(w * m for w, m, _ in mixture)


def cdf(mixture, tau, x):
    parts = components(mixture, tau, 1 - tau)
    return sum(w * torch.special.ndtr((x - m) / math.sqrt(v)) for w, m, v in parts)


def transported(mixture, method, noise):
    """Where the exact flow of draw() ends. The last step, at the least noise, is ddim's."""
    taus = method.times(2, even=True)
    start, end = taus[0], taus[-1]
    quantile = cdf(mixture, start, noise.double() * math.hypot(start, 1 - start))
    low, high = torch.full_like(quantile, -9), torch.full_like(quantile, 9)
    for _ in range(80):  # bisection
        middle = (low + high) / 2
        below = cdf(mixture, end, middle) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    if end < 1:
        low = predictions(mixture, torch.tensor(end), torch.tensor(1 - end), low)[0]
    return low
