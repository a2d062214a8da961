"""Thin adapters to other people's attention kernels, to stand beside ours in a table. Each package is optional."""
