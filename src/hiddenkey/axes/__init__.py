"""The three axes of the framework (arXiv 2403.00812, section 3): position, pattern, compensation."""
