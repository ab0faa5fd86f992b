"""The models under study, presets, and real weights and photographs without a hub. Imports core."""
