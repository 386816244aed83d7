"""What runs a model: PyTorch, ONNX Runtime, language models."""
