"""Files in and out: images and their batches, model folders, progress bars.

Imports `jaxvit.model` alone.
"""
