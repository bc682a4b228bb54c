"""Published data sets: download, safe extraction, and readers of their split files."""
