"""The model, and what can be read and changed inside it: config, tokens, sites, edits, layers and the blocks' runner.

Imports nothing else of jaxvit.
"""
