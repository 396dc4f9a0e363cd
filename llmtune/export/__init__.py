"""A trained model in the form that other tools load: merged, described, published whole."""
