"""The study of arXiv 2403.00812: records, tables, figures and claims. Not installed; run by `python -m study`."""
