"""Training runs: everything that reads a disk or a clock. Importing this room loads no torch."""
