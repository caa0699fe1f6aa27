"""Draws predictions of one scene: depth maps, points and cameras. Arrays in, files out."""
