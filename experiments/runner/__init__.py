"""Runs experiments on models, and keeps what was measured. Imports all other rooms."""
