"""The files of a model's weights: names, shapes, loading."""
