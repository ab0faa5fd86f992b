"""Edits by the names of what they do, and what runs many of them: grids, sweeps, statistics, appended registers.

Imports all other rooms of jaxvit; none of them imports it.
"""
