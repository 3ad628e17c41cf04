"""Published checkpoints to our parameters and back."""
