"""Adapters on the model of a run: attached, begun or resumed."""
