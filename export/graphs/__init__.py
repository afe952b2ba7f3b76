"""Writes a package's graphs and weights: decoder, images, gate; and how matrices are quantised."""
