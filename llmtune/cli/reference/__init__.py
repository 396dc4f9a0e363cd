"""Descriptions of the configuration that the command line prints."""
