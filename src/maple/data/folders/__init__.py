"""A user's own images: folders of classes, folders of domains, and tables of paths and labels."""
