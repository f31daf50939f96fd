"""
Faces in pixel art, drawn here and judged exactly by bench/faces.py. Not measured to its end yet.
    python cfm.py config/faces.py
"""
dataset = "faces"
out_dir = "out/faces"
patch = 1                # every pixel counts: with 2, noise was left in flat colours
channels = 16            # 27 MFLOP a picture
max_iters = 9000         # 13 epochs
eval_interval = 1500
sample_steps = 20
