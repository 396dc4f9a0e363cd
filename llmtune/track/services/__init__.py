"""Experiment trackers beside the run folder's own files, one file per tracker."""
