"""Run folders: a manifest and immutable Parquet parts. No torch, no database in the write path."""
