"""Where frozen models come from, and what shields them from their surroundings."""
