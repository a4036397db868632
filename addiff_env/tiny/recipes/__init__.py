"""Training recipes of the embedded world's models; ``addiff world train <name>`` runs one, without a name all."""

RECIPES = ("data", "autoencoder", "diffusion", "generate", "clip", "dino", "reward")  # each needs those before it
FURTHER = ("endings", "verifier", "lookers")  # of models that no preset uses yet
