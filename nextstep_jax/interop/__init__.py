"""Models on disk: the model directory that training writes and sampling reads."""
