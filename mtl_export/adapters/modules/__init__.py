"""Each paper's forward pass as a PyTorch module: for training, and as parity's oracle."""
