"""Collections of images that are unpacked to be trained on: Parquet, Arrow, archives, shards, data sets of the hub."""
