"""`hiddenkey bench`: what drops cost, in ratios to plain LoRA, and the page that says so."""
