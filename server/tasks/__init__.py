"""Keras model in, task file out. The only folder that imports TensorFlow."""
