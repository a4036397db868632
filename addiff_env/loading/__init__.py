"""Where paths lead and frozen models come from, what they cost, and what shields them from their surroundings."""
