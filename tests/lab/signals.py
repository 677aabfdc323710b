"""Ctrl-C for the processes that tests start."""

import signal


def heed_interrupts() -> None:
    """For `preexec_fn`: a shell's background job ignores Ctrl-C, and so do the tests in it and what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
