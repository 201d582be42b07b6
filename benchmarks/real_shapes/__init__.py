"""Short runs of the training scripts on models of the published shapes with random weights: time and memory."""
