"""One task folded into the base: ``AdapterSet`` into a model folder."""
