"""Whether this package computes what the original DragNUWA 1.5 code computes, array by array.

    python -m nuwa_jax.golden DIR [--only=unet,vae,...] [--json=FILE]

DIR holds what one run of the original code was given and what it made of it: its config, its random
weights, and inputs and outputs of every part, from single blocks to a whole sampled video. Sizes,
places and numbers of steps are read from the folder; none is assumed here.
"""
