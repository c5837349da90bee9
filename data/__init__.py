"""The data: MAT as published (mat.py), drawn on a laptop scale
(mini.py), and the embedded checkpoint (tiny/)."""
