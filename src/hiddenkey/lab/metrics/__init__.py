"""Metrics of generated texts against references, as the script of the E2E challenge has them."""
