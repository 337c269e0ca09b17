"""Which node holds which layers, and why. Pure: profiles in, plan out."""
