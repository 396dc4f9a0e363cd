"""One file per task; each registers one object."""
