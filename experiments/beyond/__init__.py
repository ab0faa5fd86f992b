"""What goes beyond the paper: B1 to B7, and sensitivity to readings. Imports core, models and paper."""
