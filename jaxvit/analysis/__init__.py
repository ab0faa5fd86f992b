"""Functions of what a run recorded: exact parts of attention updates, similarity of features, arrays with named axes.

Imports `jaxvit.model` and `jaxvit.io`.
"""
