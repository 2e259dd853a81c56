"""DreamBooth in JAX: personalise a text-to-image cascade with a few images of one subject."""
