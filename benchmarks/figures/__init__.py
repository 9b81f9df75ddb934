"""Figures 1 and 2 of Lu et al. (2018)."""
