"""The low-rank layer and, one file each, the methods that start it."""
