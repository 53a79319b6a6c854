"""Prometheus metrics: imported only by a server that serves them."""
