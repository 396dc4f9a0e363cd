"""The machine: its accelerators, what they can do, and what they are called."""
