"""The groups of verbs that work on what is finished."""
