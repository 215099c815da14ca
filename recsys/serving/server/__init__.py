"""The server of a package: Open Inference Protocol v2 over HTTP and gRPC, and `POST /v1/rank`."""
