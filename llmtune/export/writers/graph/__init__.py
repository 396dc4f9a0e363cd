"""ONNX and TorchScript."""
