"""Training recipes of the embedded world's models; ``addiff world train <name>`` runs one, without a name all."""

RECIPES = ("data", "autoencoder", "diffusion", "generate", "clip", "dino", "reward")  # each needs those before it
FURTHER = ("endings", "verifier", "lookers", "preview", "attempts")  # what the id's own preset does not use
