"""The length of a run: how many steps it has, and how many rows each of them."""
