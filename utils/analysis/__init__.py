"""What trained transformers look at, measured on real images."""
