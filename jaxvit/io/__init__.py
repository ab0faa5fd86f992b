"""Files in and out: images and their batches, model folders and their provenance, progress bars.

Imports `jaxvit.model` alone.
"""
