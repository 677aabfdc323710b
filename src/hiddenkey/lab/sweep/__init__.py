"""Sweeps: many runs from one file, by any number of processes and machines, safe against any kill."""
