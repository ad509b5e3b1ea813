"""Pictures: figures of a run and of a trained model, and the latent-space explorer."""
