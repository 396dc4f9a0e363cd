"""The schema of groups that are large: one file a group."""
