"""The app that benchmarks/flower.py has Flower run."""
