"""
A small UNet for diffusion models: model(t, x, y) -> a tensor like x.

Shapes, used throughout:  B pictures, C channels of H x W pixels.
    t  (B,)          float, the time: from 0 to 1
    x  (B, C, H, W)  float, any H and W
    y  (B,)          long: a class in [0, num_classes), or -1 for no label

It is the UNet of Ho et al. 2020 (arXiv 2006.11239, appendix B): residual blocks at several
resolutions, down and up again. Each block on the way up also gets the output of its counterpart.
At their size it has as many parameters as theirs, but norms have fewer groups, and attention heads
64 channels. Two changes make it cheap: pixels may be folded into channels first (patch), and
convolutions come before upsampling, not after it.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Norm(nn.GroupNorm):
    """Group normalisation, in at most 8 groups, or in as many as UNet sets."""

    def __init__(self, channels):
        super().__init__(math.gcd(8, channels), channels)

    def forward(self, x):
        # not F.group_norm(), which rejects groups of one value: pictures may be of any size
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def zero_init(layer):
    """Zero the layer's parameters, so that it adds nothing when training starts."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t, dim, highest=1000, max_period=10_000):
    """
    Cosines and sines of t: (B,) -> (B, dim)

    Frequencies fall geometrically from highest towards highest / max_period. dim is even. The usual
    ones suit t = 1 ... 1000: without the factor highest, all t in [0, 1] would look alike.
    """
    i = torch.arange(dim // 2, device=t.device)
    frequency = torch.exp(-math.log(max_period) * i / (dim // 2))
    angle = highest * t[:, None] * frequency                    # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResBlock(nn.Module):
    """(B, c_in, h, w) and an embedding (B, emb) -> (B, c_out, h, w)"""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shift = nn.Linear(emb, c_out)
        self.norm2 = Norm(c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.shift(emb)[:, :, None, None]               # time and class enter here
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention among the h * w positions: (B, c, h, w) -> (B, c, h, w)"""

    def __init__(self, c, head_dim=64):
        super().__init__()
        self.heads = max(1, c // head_dim)
        if c % self.heads:
            raise ValueError(f"attention over {c} channels: "
                             f"they do not divide into {self.heads} heads")
        self.norm = Norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero_init(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)               # (B, heads, h * w, c / heads)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(a.transpose(-1, -2).reshape(B, c, h, w))


class Block(nn.ModuleList):
    """A residual block, then attention if attends: (B, c_in, h, w) -> (B, c_out, h, w)"""

    def __init__(self, c_in, c_out, emb, dropout, attends):
        super().__init__([
            ResBlock(c_in, c_out, emb, dropout),
            Attention(c_out) if attends else nn.Identity(),
        ])

    def forward(self, x, emb):
        residual, attention = self
        return attention(residual(x, emb))


class UNet(nn.Module):
    """
    in_channels       C
    channels          base width, even; level i has channels * channel_mults[i]
    channel_mults     one entry per level; level i works at H / patch / 2^i by W / patch / 2^i
    n_res_blocks      blocks per level on the way down; one more on the way up
    attention_levels  levels with attention, from 0; one past the last is the middle
    dropout           in [0, 1], inside the residual blocks
    patch             patch x patch pixels are folded into channels: 2 works at half resolution
    norm_groups       at most so many groups of channels, each normalised by its own mean and
                      deviation over the picture. Fewer groups keep its colours more exact
    num_classes       0 for a model without labels

    Raises ValueError if channels is odd or attention_levels names a level that does not exist.
    """

    def __init__(self, in_channels=1, channels=24, channel_mults=(1, 2), n_res_blocks=1,
                 attention_levels=(2,), dropout=0.0, patch=2, norm_groups=8, num_classes=0):
        super().__init__()
        levels = len(channel_mults)
        if channels % 2:
            raise ValueError("channels must be even, for the time embedding's pairs, "
                             f"but is {channels}")
        if not set(attention_levels) <= set(range(levels + 1)):
            raise ValueError(f"attention_levels {attention_levels}: "
                             f"levels go from 0 to {levels}, the middle")
        self.channels = channels
        self.patch = patch
        self.multiple = patch * 2 ** (levels - 1)               # H and W are padded to multiples
        widths = [channels * m for m in channel_mults]
        emb = 4 * channels

        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(1 + num_classes, emb) if num_classes else None    # 0: no label
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)

        c = channels                                            # the width so far
        skips = [c]                                             # widths of the skip connections
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(nn.ModuleList())
            for _ in range(n_res_blocks):
                self.down[i].append(Block(c, width, emb, dropout, i in attention_levels))
                c = width
                skips.append(c)
            if i < levels - 1:
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)

        self.middle = nn.ModuleList([
            Block(c, c, emb, dropout, levels in attention_levels),
            Block(c, c, emb, dropout, False),
        ])

        for i, width in reversed(list(enumerate(widths))):
            self.up.append(nn.ModuleList())
            for _ in range(n_res_blocks + 1):
                c += skips.pop()
                self.up[-1].append(Block(c, width, emb, dropout, i in attention_levels))
                c = width
            if i > 0:
                self.grow.append(nn.Conv2d(c, c, 3, padding=1))

        self.norm_out = Norm(c)
        self.conv_out = zero_init(nn.Conv2d(c, in_channels * patch**2, 3, padding=1))

        for module in self.modules():
            if isinstance(module, Norm):
                module.num_groups = math.gcd(norm_groups, module.num_channels)

    def embed(self, t, y=None):
        """The embedding of times t (B,) and labels y (B,) or None, for all blocks: (B, emb)."""
        emb = self.time(time_embedding(t, self.channels).to(self.conv_in.weight.dtype))
        if self.label is None:
            return emb
        if y is None:
            y = torch.full_like(t, -1, dtype=torch.long)
        return emb + self.label(y + 1)

    def forward(self, t, x, y=None):
        H, W = x.shape[-2:]
        emb = F.silu(self.embed(t, y))                          # (B, emb)

        h = x.to(self.conv_in.weight.dtype)
        h = F.pad(h, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        h = self.conv_in(F.pixel_unshuffle(h, self.patch))      # (B, c, h, w)
        skips = [h]
        for i, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)                           # (B, c, h / 2, w / 2)
                skips.append(h)

        for block in self.middle:
            h = block(h, emb)

        for i, blocks in enumerate(self.up):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if i < len(self.grow):
                h = self.grow[i](h)
                h = F.interpolate(h, scale_factor=2)            # (B, c, 2h, 2w)

        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch)[:, :, :H, :W]
