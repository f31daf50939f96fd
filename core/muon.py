"""Muon, the optimizer: convolution kernels are moved by orthogonalised steps."""
import math
from collections import defaultdict
from functools import lru_cache

import torch
from torch.optim.adamw import adamw


def newton_schulz(g, steps=5):
    """
    Approximately the nearest matrices to g (n, rows, columns) with all singular values 1.

    Jordan's coefficients raise small singular values fast: in five steps all between 0.0015 and 1
    of the norm end between 0.68 and 1.20. Smaller ones stay small.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)   # -4.775 a + 2.0315 a^2
        x = torch.baddbmm(x, b, x, beta=3.4445)                 # 3.4445 x + b x
    return x if g.shape[1] <= g.shape[2] else x.mT


def orthogonalize(kernels):
    """newton_schulz() of kernels [(c_out, c_in, h, w)], each as a matrix (c_out, the rest)."""
    shapes = defaultdict(list)
    for i, kernel in enumerate(kernels):
        shapes[kernel.shape].append(i)
    directions = list(kernels)
    for shape, same in shapes.items():
        batch = newton_schulz(torch.stack([kernels[i].flatten(1) for i in same]))
        for i, direction in zip(same, batch):
            directions[i] = direction.reshape(shape)
    return directions


def orthogonalize_at_once(kernels):
    """
    The same in one zero-padded batch; the padding stays zero.

    For GPUs, where launching many small operations takes longer than their arithmetic.
    """
    last = [kernel.permute(0, 2, 3, 1) for kernel in kernels]   # as stored: channels last
    flat = torch.cat([kernel.flatten() for kernel in last])
    place, shape = padded_layout(tuple((len(k), k[0].numel()) for k in last), flat.device)
    padded = flat.new_zeros(math.prod(shape))
    padded[place] = flat
    flat = newton_schulz(padded.view(shape)).flatten()[place]
    directions = flat.split([kernel.numel() for kernel in last])
    return [d.view(k.shape).permute(0, 3, 1, 2) for d, k in zip(directions, last)]


@lru_cache(maxsize=4)
def padded_layout(shapes, device):
    """
    Flat indices of the entries of matrices of these shapes in one padded batch, and its shape.

    The batch is (n, rows, columns), large enough for each; tall matrices are transposed.
    """
    rows = max(min(shape) for shape in shapes)
    columns = max(max(shape) for shape in shapes)
    batch = torch.arange(len(shapes) * rows * columns, device=device)
    batch = batch.view(len(shapes), rows, columns)
    parts = [page[:r, :c] if r <= c else page[:c, :r].T for page, (r, c) in zip(batch, shapes)]
    return torch.cat([part.flatten() for part in parts]), batch.shape


class Muon(torch.optim.Optimizer):
    """
    Steps of the same length in all directions: Jordan et al. 2024, "Muon".

    The momentum of a convolution kernel is taken as a matrix (c_out, the rest). Its singular values
    become about 1. Steps are scaled to AdamW's usual size (Liu et al. 2025, arXiv 2502.16982,
    eq. 4), so one learning rate serves both. All other parameters use AdamW. torch.optim.Muon takes
    one matrix at a time; batching those of one shape takes a quarter of the time on a CPU.
    """

    def __init__(self, params, lr=4e-3, betas=(0.9, 0.99), momentum=0.95, weight_decay=0.01):
        defaults = dict(lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay)
        defaults["fused"] = True        # makes load_state_dict() move "step" to the device, too
        super().__init__(params, defaults)

    def add_param_group(self, group):
        """Put convolution kernels in a group of their own. __init__() calls this, too."""
        def is_kernel(p):
            return (p[1] if isinstance(p, tuple) else p).dim() == 4     # p may be a (name, p) pair

        params = group["params"]
        params = [params] if torch.is_tensor(params) else list(params)
        for kernels in (True, False):
            same = [p for p in params if is_kernel(p) == kernels]
            if same:
                super().add_param_group(group | {"params": same})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
            if params and params[0].dim() == 4:
                self.muon(params, group)
            elif params:
                self.adamw(params, group)
        return loss

    def muon(self, params, group):
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in params]
        means = [self.state[p]["mean"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum)     # Nesterov momentum
        directions = (orthogonalize_at_once if params[0].is_cuda else orthogonalize)(ahead)
        sizes = [0.2 * math.sqrt(max(len(p), p[0].numel())) for p in params]
        torch._foreach_mul_(directions, sizes)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, directions, alpha=-lr)

    def adamw(self, params, group):
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["square"] = torch.zeros_like(p)
                self.state[p]["step"] = torch.zeros((), device=p.device)
        grads = [p.grad for p in params]
        means = [self.state[p]["mean"] for p in params]
        squares = [self.state[p]["square"] for p in params]
        steps = [self.state[p]["step"] for p in params]
        beta1, beta2 = group["betas"]
        adamw(params, grads, means, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
              weight_decay=group["weight_decay"], eps=1e-8,
              fused=True, amsgrad=False, maximize=False)
