"""gRPC dress of xlarank: codec, service, status, server and client. No ranking logic.

Clients import `xlarank_serving.client`; `xlarank serve` imports `xlarank_serving.server`.
"""
