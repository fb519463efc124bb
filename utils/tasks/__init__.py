"""What the loop trains: each task says how a batch becomes losses and gradients, and how good the model is."""
