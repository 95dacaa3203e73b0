"""Speed of the op and of exported models."""
