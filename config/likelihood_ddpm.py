"""
MNIST for low bits/dim. If log SNR is linear in t, eps's plain loss is the bound, up to constants.
    python ddpm.py config/likelihood_ddpm.py
    python examples/likelihood.py --out_dir=out/likelihood-ddpm --n_samples=10000 --steps=20
"""
out_dir = "out/likelihood-ddpm"
schedule = "log_snr"     # Kingma et al. 2021 (arXiv 2107.00630); noise from a sixth of a grey level
prediction = "eps"
weighting = "simple"
variance = "fixedsmall"  # that of q itself; fixedlarge costs 0.08 bits/dim
t_uniform = 1.0          # all terms equally often
label_dropout = 0.0      # no guidance here
patch = 1                # bits are decided pixel by pixel, so at full resolution,
channels = 16            # with few channels there: three quarters of the default's pictures/s
channel_mults = (1, 1, 2)
attention_levels = (3,)  # the middle block, at 7 x 7
