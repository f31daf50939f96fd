"""
MNIST where bits/dim are the goal. These are decided near the data, where the default cfm.py never looks.
    python cfm.py config/likelihood_cfm.py
    python sample.py --out_dir=out/likelihood-cfm --task=likelihood --n_samples=1000
"""
out_dir = "out/likelihood-cfm"
t_mean = 3.0             # most times are close to 1, the data,
t_uniform = 0.4          # and the rest are anywhere
sigma = 0.0025           # spreads each grey level about as widely as levels lie apart, 0.0078
label_dropout = 0.0      # as there is no guidance
