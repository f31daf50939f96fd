"""
MNIST for few bits/dim. For eps, at signal-to-noise ratios even in their logarithm, the plain squared error is the bound, but for constants.
    python ddpm.py config/likelihood_ddpm.py
    python sample.py --out_dir=out/likelihood-ddpm --task=likelihood --n_samples=10000 --steps=20
"""
out_dir = "out/likelihood-ddpm"
schedule = "log_snr"     # Kingma et al. 2021 (arXiv 2107.00630): from noise of a sixth of a grey level on
prediction = "eps"
weighting = "simple"
variance = "fixedsmall"  # of q itself: the other costs 0.08 bits/dim
t_uniform = 1.0          # each term as often
label_dropout = 0.0      # as there is no guidance
patch = 1                # bits are decided pixel by pixel, so at full resolution,
channels = 16            # with few channels there: three quarters as many pictures/s as the default
channel_mults = (1, 1, 2)
attention_levels = (3,)  # the middle block, at 7 x 7
