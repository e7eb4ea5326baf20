"""The native implementations: each function checks its tensors once and makes one call into penstock._native."""
