"""The server of a package: Open Inference Protocol v2 over HTTP and gRPC, and `POST /v1/rank`.

FastAPI, uvicorn, grpcio and prometheus-client do the work of a server; what is here translates
requests into calls of `Scorer`. They are the extra `serve`, which nothing else needs.
"""
