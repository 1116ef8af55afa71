"""What every role needs to speak gRPC the same way: typed errors, mTLS identities, roles per RPC."""
