"""A folder that is written aside, named in one step, and uploaded."""
