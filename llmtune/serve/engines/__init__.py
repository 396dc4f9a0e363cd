"""Servers, one file each."""
