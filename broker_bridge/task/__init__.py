"""What is trained: the task file, and the one place that runs it with TensorFlow Lite."""
