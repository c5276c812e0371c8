"""One file, one diagnostic; the folder is the registry."""
