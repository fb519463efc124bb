"""What the commands need around the models: configuration, files, data, optimisation, logs and pictures."""
