"""The experiments of Lappe & Giese 2025, and what goes beyond them: `jaxvit run --help`."""

if __name__ == "experiments":  # in a checkout, this is jaxvit.experiments
    from jaxvit.checkout import alias

    alias(__name__)
