"""Messages of the server: JSON and tensors of requests, and what is written of predictions."""
