"""A HiFi-GAN vocoder ported from PyTorch: loaded from a state dict, trained further on (g, v), folded and exported."""
