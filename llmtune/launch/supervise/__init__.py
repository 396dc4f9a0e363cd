"""N ranks of this machine: started, watched, signaled, ended."""
