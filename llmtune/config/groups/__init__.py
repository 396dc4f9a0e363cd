"""The keys of each config group, with their types, units and defaults."""
