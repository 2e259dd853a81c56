"""Personalisation, phase by phase: what is configured, what a run keeps, what comes of it."""
