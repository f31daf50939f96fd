"""
Your own colour pictures of 32 to 64 pixels, a few thousand of them, on a CPU:
    python cfm.py config/pictures.py --dataset=path/to/pictures
    python sample.py --out_dir=out/pictures --sampler=ddim --eta=1 --steps=50
Measured on 3,390 emoji: 40 minutes of one core. With 339 of them, the held-out loss rises after
1000 iterations: stop there. See bench/README.md, "A folder of pictures".
"""
out_dir = "out/pictures"
image_size = 32
channels = 32            # 657,388 parameters, 111 MFLOP a picture
norm_groups = 1          # as for faces, whose colours are more exact with it
max_iters = 8000
eval_interval = 1000
sample_steps = 10        # of dpm++; 20 look alike
