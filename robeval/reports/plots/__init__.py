"""Pictures: one file, one kind; each gives the numbers behind it first and paints them second."""
