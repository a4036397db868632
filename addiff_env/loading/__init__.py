"""Where paths lead and frozen models come from, and what shields models from their surroundings."""
