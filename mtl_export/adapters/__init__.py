"""Each paper's tensors into one normal form: ``Checkpoint`` into ``AdapterSet``."""
