"""Side concerns of the loop: evaluation, samples, what a line sums up, numbers that diverge."""
