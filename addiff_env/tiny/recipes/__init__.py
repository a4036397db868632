"""Training recipes of the embedded world's models; ``python -m addiff_env.tiny.recipes.<name>`` runs one."""
