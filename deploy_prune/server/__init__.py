"""Serve bundles over the Open Inference Protocol, HTTP and gRPC."""
