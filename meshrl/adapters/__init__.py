"""Other libraries' interfaces over the same client."""
