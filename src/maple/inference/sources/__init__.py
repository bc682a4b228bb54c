"""What predictions are made of: files, folders, archives, addresses, tables and shards, and images in memory."""
