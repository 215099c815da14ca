"""The plain PyTorch twin that the product's steps are compared with, and its batches."""
