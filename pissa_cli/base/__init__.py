"""The model that is adapted: its files, its layers, the adapter around them."""
