"""One weight matrix: its SVD, its 4-bit form, products with it."""
