"""The report: tables, figures and a page from the runs of sweeps."""
