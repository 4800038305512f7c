"""The reliability suite: faults are injected, and the figure reached stands beside the figure promised."""
