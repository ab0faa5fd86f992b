"""Models that are trained alike but for one thing: registers, or what [CLS] may read. What do they become?

Imports the rooms `models` and `runner`.
"""
