"""Start, tie together and end the processes of ranks, and filter what they print."""
