"""Forms: what sites are lowered to once their mode is known."""
