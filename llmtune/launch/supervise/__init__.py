"""N ranks of this machine: started, watched, signalled, ended."""
