"""Prompts to evaluate on."""
