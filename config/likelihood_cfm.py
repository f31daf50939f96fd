"""
MNIST for low bits/dim. They are decided near the data, where cfm.py hardly trains by default.
    python cfm.py config/likelihood_cfm.py
    python examples/likelihood.py --out_dir=out/likelihood-cfm --n_samples=1000
"""
out_dir = "out/likelihood-cfm"
t_mean = 3.0             # most times are close to 1, the data,
t_uniform = 0.4          # and the rest are anywhere
sigma = 0.0025           # about the std of dequantisation noise: 0.0078 / sqrt(12)
label_dropout = 0.0      # no guidance here
patch = 1                # bits are decided pixel by pixel, so at full resolution,
channels = 16            # with few channels there: three quarters of the default's pictures/s
channel_mults = (1, 1, 2)
attention_levels = (3,)  # the middle block, at 7 x 7
