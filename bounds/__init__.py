"""One file, one bound. The folder is the registry: a new file needs no other edit."""
