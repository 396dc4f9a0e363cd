"""Build every object of a run, and the batches that it is trained on."""
