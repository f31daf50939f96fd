"""
Faces in pixel art, drawn here and judged exactly by bench/faces.py.
    python cfm.py config/faces.py
The weights in assets/faces took 15 minutes of one busy CPU core. Their faces look right, but the
judge, whose colours are exact, finds hardly any of them legal: see bench/README.md.
"""
dataset = "faces"
out_dir = "out/faces"
patch = 1                # every pixel counts: with 2, noise was left in flat colours
channels = 16            # 27 MFLOP a picture
norm_groups = 1          # with 8, which is 2 channels each, colours were off: see bench/LOG.md
t_mean = 0.5             # more often near the data, where colours become flat
t_uniform = 0.1
max_iters = 9000         # 13 epochs
eval_interval = 1500
sample_steps = 20
