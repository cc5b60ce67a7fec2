"""What HTTP and gRPC share: errors and their answers, streams, tensors."""
