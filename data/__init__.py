"""The data: MAT as published (mat.py), MAT-mini drawn at the scale of a laptop (mini.py,
mini_search.py), and the embedded checkpoints (tiny/, tiny-search/)."""
