"""What on this machine would stop a run."""
