"""Adapters on experts whose matrices are stacked in one parameter."""
