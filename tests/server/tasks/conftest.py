"""TensorFlow before tflite-runtime breaks a process; the other way round both work."""

import os

import broker_bridge.task.runtime as runtime

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
runtime._load_module(None)
