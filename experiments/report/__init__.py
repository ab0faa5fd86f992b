"""Pages for people: the report and the explorer of single images. Imports core and models."""
