"""
MNIST in one evaluation of the model, which learns from pairs of noise and digit of a trained flow.
    python cfm.py    # or use assets/cfm for out/cfm below, and add --init_from=assets/cfm to train
    python sample.py --out_dir=out/cfm --n_samples=200000 --seed=1 --steps=6 --keep_noise --save=out/pairs.npz
    python cfm.py config/one_step.py
    python sample.py --out_dir=out/one-step             # in one step; with --steps=2 it is better
"""
dataset = "out/pairs.npz"
init_from = "out/cfm"
out_dir = "out/one-step"
t_uniform = 0.0          # as in all its measured runs
spans = 0.75             # of a batch: 1/2 whole spans, 1/4 partial ones, 1/4 single times
sampler = "meanflow"
sample_steps = 1
max_iters = 11_000
eval_interval = 2750
label_dropout = 0.0      # no guidance here
