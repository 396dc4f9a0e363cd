"""Metrics of an evaluation: functions of all its predictions, gathered on the host.

Each takes every row exactly once, so that its values do not depend on the number of ranks.
"""
