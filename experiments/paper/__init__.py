"""The experiments of Lappe & Giese 2025, A1 to A9: one module each, with `EXPERIMENT`. Imports core."""
