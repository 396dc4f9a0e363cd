"""Verbs that are given run folders."""
