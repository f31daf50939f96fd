"""
MNIST where the bound is the goal: on the noise, evenly over the logarithm of the signal-to-noise ratio, a plain squared error is it.
    python ddpm.py config/likelihood_ddpm.py
    python sample.py --out_dir=out/likelihood-ddpm --task=likelihood --n_samples=100
"""
out_dir = "out/likelihood-ddpm"
schedule = "log_snr"     # from a seventh of a grey level of noise on: Kingma et al. 2021 (arXiv 2107.00630)
prediction = "eps"
weighting = "simple"     # then the loss is the bound, up to a factor
t_uniform = 1.0          # each term as often
label_dropout = 0.0      # as there is no guidance
