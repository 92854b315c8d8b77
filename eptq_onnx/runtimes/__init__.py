"""What a runtime makes of a written model."""
