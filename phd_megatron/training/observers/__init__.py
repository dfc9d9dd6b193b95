"""What watches a training step without taking part in it."""
