"""Attacks of other packages, run as they are and judged like our own: one file, one package."""
