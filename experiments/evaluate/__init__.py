"""Tasks under interventions: `jaxvit evaluate`. Imports core and models.

`under` reads what is done to the model, `data` gives images with answers, `study` runs the model and scores tasks,
`command` is the command line.
"""
