"""The arithmetic of batches: what they cost, how items are packed, whose turn it is. Pure; imports numpy alone."""
