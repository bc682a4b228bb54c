"""Checks of data sets: unreadable images, duplicates, class names, and the published statistics."""
