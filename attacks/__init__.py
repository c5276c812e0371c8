"""One file, one attack. The folder is the registry: a new file needs no other edit."""
