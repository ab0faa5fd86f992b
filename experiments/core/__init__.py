"""What an experiment is made of: runs of a model, what is measured of them, claims, charts. Imports no other room."""
