"""The same training step under several layouts: does it give the same numbers?"""
