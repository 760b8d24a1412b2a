"""ONNX → a plan of TensorRT, in a process of its own under the interpreter that has TensorRT."""

# Part of the engine key: raise it with every change that changes a plan.
VERSION = 1
