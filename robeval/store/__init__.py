"""Run folders: a manifest, immutable Parquet parts, stored images. No torch."""
