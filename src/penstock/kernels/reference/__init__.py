"""The reference implementations, in plain torch: slow, obvious and always right."""
