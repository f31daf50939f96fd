"""
Your own colour pictures, a few thousand of them, brought to 32 x 32 pixels, on a CPU:
    python cfm.py config/pictures.py --dataset=path/to/pictures
    python sample.py --out_dir=out/pictures --sampler=ddim --eta=1 --steps=50
Measured on 3,390 emoji: 40 minutes of one core. With 339 of them the held-out loss already rises
between 1,000 and 2,000 iterations: for so few, --max_iters=1000 or less. See bench/README.md, "A
folder of pictures". 64 x 64 pixels (--image_size=64) cost four times as much, and were not tried.
"""
out_dir = "out/pictures"
image_size = 32
channels = 32            # 657,388 parameters, 111 MFLOP a picture
norm_groups = 1          # as for faces, whose colours are more exact with it
max_iters = 8000
eval_interval = 1000
sample_steps = 10        # of dpm++; 20 look alike
