"""What chooses training data: scorers that rate documents, and the cluster pipeline around them."""
